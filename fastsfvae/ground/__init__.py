"""What everything else stands on: files, origins, progress, options."""
