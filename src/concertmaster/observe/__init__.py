"""What happened: traces, reports, plots and metrics."""
