"""Pictures, controls and the report."""
