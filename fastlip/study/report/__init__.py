"""What users read: tables, figures, the HTML report, comparisons of runs, data frames."""
