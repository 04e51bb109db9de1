"""Images, data sets and captions."""
