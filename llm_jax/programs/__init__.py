"""From a config to compiled programs, and from folders to what they run on."""
