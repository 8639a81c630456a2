"""What moves a run. `intake` takes files in, `state` keeps what is committed, `owner` trains, `proof` verifies, `outside` reports."""
