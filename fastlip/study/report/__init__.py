"""What people read of a run: tables, figures, the HTML report, data frames."""
