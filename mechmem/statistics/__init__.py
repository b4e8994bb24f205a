"""Statistics: intervals, rows of tables, and the choice of rows."""
