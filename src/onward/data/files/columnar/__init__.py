"""Files that store rows column by column: Parquet and Arrow. Only these need pyarrow."""
