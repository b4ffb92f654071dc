"""What is told of a run afterwards: reports, and bundles of failures."""
