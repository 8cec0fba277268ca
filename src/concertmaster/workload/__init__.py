"""What agents ask for: traces, workflows, chain templates and arrivals."""
