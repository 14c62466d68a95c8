"""Random programs: descriptions drawn by hypothesis, the source of the program each describes, and its check."""
