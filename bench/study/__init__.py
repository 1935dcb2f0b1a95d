"""The method's ablations: runs, comparisons, tables, pictures and the report."""
