"""The intervals, the record and the page of an audit."""
