"""The papers' tables and figures, what is measured beside what is printed."""
