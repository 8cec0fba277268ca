"""What outlives the process, in SQLite behind small interfaces."""
