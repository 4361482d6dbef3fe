"""What a run can do besides training: the measurements of the paper's tables, one task in each file."""
