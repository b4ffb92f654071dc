"""The edge: command lines in, exit statuses out. Nothing here knows how a guest is converted."""
