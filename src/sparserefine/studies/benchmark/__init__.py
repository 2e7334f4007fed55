"""``sparserefine benchmark``: inputs, measuring, records, tables and charts."""
