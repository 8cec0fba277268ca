"""What outlives the process: keys and tenants, in SQLite behind small interfaces."""
