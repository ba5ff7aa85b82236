"""Pages that show a run, a comparison or evaluations: one HTML file, or Markdown."""
