"""What can be known of a batch before its first byte."""
