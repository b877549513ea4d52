"""From the table of runs to the verdict: analysis, figures, and the page that says it."""
