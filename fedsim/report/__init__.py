"""Tables, plots and the HTML page, from recorded files only."""
