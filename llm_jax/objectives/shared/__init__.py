"""What several objectives share, and the host half of those that are long."""
