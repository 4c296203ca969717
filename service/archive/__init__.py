"""The archive: closed days of the span log as Parquet files, for any engine to query."""
