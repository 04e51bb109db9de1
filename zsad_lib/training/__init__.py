"""The papers' own training: semantic guides on any data set."""
