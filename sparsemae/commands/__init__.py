"""What the command line does, one file a command; `training` and `tasks` do the work."""
