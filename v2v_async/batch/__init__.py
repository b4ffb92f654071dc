"""Many guests in one run, under limits that hold together."""
