"""In-place conversion: on an overlay first; then what changed lands on the disks."""
