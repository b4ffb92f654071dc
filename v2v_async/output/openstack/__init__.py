"""Outputs to OpenStack: images in Glance, volumes in Cinder."""
