"""What the command line offers beside running: check, bench, doctor, report."""
