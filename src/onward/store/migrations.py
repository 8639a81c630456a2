"""The ledger's schema as numbered, append-only migrations; `PRAGMA user_version` counts those applied."""

from __future__ import annotations

import contextlib
import sqlite3

from onward.errors import NEWER_RELEASE, OnwardError

MIGRATIONS = (
    """
    CREATE TABLE run (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;

    CREATE TABLE configs (fingerprint TEXT PRIMARY KEY, config TEXT NOT NULL) STRICT;

    CREATE TABLE files (
        id INTEGER PRIMARY KEY,
        command TEXT NOT NULL,
        name TEXT NOT NULL,
        sha256 TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        format TEXT NOT NULL,
        copy TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('arriving', 'rejected', 'queued', 'training', 'done', 'undone')),
        again INTEGER NOT NULL DEFAULT 0,
        priority INTEGER NOT NULL DEFAULT 0,
        position INTEGER,
        rows INTEGER NOT NULL DEFAULT 0,
        tokens INTEGER NOT NULL DEFAULT 0,
        target_tokens INTEGER NOT NULL DEFAULT 0,
        truncated INTEGER NOT NULL DEFAULT 0,
        dropped INTEGER NOT NULL DEFAULT 0,
        config TEXT REFERENCES configs (fingerprint),
        start_step INTEGER,
        planned_steps INTEGER,
        arrived REAL NOT NULL,
        finished REAL,
        note TEXT
    ) STRICT;
    CREATE UNIQUE INDEX files_position ON files (position) WHERE position IS NOT NULL AND state != 'undone';
    CREATE INDEX files_sha256 ON files (sha256);
    CREATE INDEX files_state ON files (state, priority, id);

    CREATE TABLE steps (
        file_id INTEGER NOT NULL REFERENCES files (id),
        step INTEGER NOT NULL,
        step_in_file INTEGER NOT NULL,
        epoch INTEGER NOT NULL,
        rows INTEGER NOT NULL,
        rows_digest TEXT NOT NULL,
        tokens INTEGER NOT NULL,
        target_tokens INTEGER NOT NULL,
        loss REAL NOT NULL,
        learning_rate REAL NOT NULL,
        grad_norm REAL NOT NULL,
        seconds REAL NOT NULL,
        PRIMARY KEY (file_id, step)
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE checkpoints (
        id INTEGER PRIMARY KEY,
        step INTEGER NOT NULL,
        file_id INTEGER REFERENCES files (id),
        boundary INTEGER NOT NULL,
        state_digest TEXT NOT NULL,
        basis TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('writing', 'committed', 'lost', 'undone')),
        bytes INTEGER NOT NULL DEFAULT 0,
        seconds REAL NOT NULL DEFAULT 0,
        created REAL NOT NULL
    ) STRICT;
    CREATE INDEX checkpoints_step ON checkpoints (step, state);

    CREATE TABLE handovers (
        id INTEGER PRIMARY KEY,
        kind TEXT NOT NULL,
        step INTEGER NOT NULL,
        file_id INTEGER REFERENCES files (id),
        class TEXT NOT NULL,
        before TEXT NOT NULL,
        after TEXT NOT NULL,
        difference REAL NOT NULL,
        created REAL NOT NULL
    ) STRICT;
    CREATE INDEX handovers_file ON handovers (file_id);

    CREATE TABLE config_changes (
        id INTEGER PRIMARY KEY,
        step INTEGER NOT NULL,
        file_id INTEGER NOT NULL REFERENCES files (id),
        key TEXT NOT NULL,
        old TEXT NOT NULL,
        new TEXT NOT NULL,
        created REAL NOT NULL
    ) STRICT;

    CREATE TABLE events (
        id INTEGER PRIMARY KEY,
        level TEXT NOT NULL CHECK (level IN ('info', 'warning', 'error')),
        message TEXT NOT NULL,
        step INTEGER,
        created REAL NOT NULL
    ) STRICT;
    """,
    """
    CREATE TABLE files_2 (
        id INTEGER PRIMARY KEY,
        command TEXT NOT NULL,
        name TEXT NOT NULL,
        sha256 TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        format TEXT NOT NULL,
        copy TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN (
            'arriving', 'rejected', 'queued', 'training', 'done', 'undone', 'skipped', 'quarantined'
        )),
        again INTEGER NOT NULL DEFAULT 0,
        priority INTEGER NOT NULL DEFAULT 0,
        position INTEGER,
        rows INTEGER NOT NULL DEFAULT 0,
        tokens INTEGER NOT NULL DEFAULT 0,
        target_tokens INTEGER NOT NULL DEFAULT 0,
        truncated INTEGER NOT NULL DEFAULT 0,
        dropped INTEGER NOT NULL DEFAULT 0,
        config TEXT REFERENCES configs (fingerprint),
        start_step INTEGER,
        planned_steps INTEGER,
        arrived REAL NOT NULL,
        finished REAL,
        note TEXT,
        inbox TEXT,
        failures INTEGER NOT NULL DEFAULT 0,
        parts INTEGER
    ) STRICT;
    INSERT INTO files_2 SELECT *, NULL, 0, NULL FROM files;
    DROP TABLE files;
    ALTER TABLE files_2 RENAME TO files;
    CREATE UNIQUE INDEX files_position ON files (position)
        WHERE position IS NOT NULL AND state IN ('queued', 'training', 'done');
    CREATE INDEX files_sha256 ON files (sha256);
    CREATE INDEX files_queue ON files (state, priority DESC, id);
    CREATE INDEX files_stream ON files (state, position);
    CREATE INDEX files_command ON files (command);

    ALTER TABLE events ADD COLUMN kind TEXT;

    CREATE TABLE requests (
        id INTEGER PRIMARY KEY,
        kind TEXT NOT NULL CHECK (kind IN ('pause', 'resume', 'stop', 'skip')),
        argument TEXT,
        created REAL NOT NULL,
        acknowledged REAL,
        answer TEXT
    ) STRICT;
    CREATE INDEX requests_open ON requests (id) WHERE acknowledged IS NULL;
    """,
    """
    ALTER TABLE files ADD COLUMN attempts INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE files ADD COLUMN occurrence INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE files ADD COLUMN seen TEXT;
    ALTER TABLE requests ADD COLUMN file_id INTEGER;

    CREATE TABLE intents (
        id INTEGER PRIMARY KEY,
        paths TEXT NOT NULL,
        again INTEGER NOT NULL,
        priority INTEGER NOT NULL,
        created REAL NOT NULL
    ) STRICT;

    CREATE TABLE boundary_results (
        file_id INTEGER NOT NULL REFERENCES files (id),
        step INTEGER NOT NULL,
        name TEXT NOT NULL,
        value TEXT NOT NULL,
        created REAL NOT NULL,
        PRIMARY KEY (file_id, step, name)
    ) STRICT, WITHOUT ROWID;
    """,
    """
    ALTER TABLE files ADD COLUMN split INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE files ADD COLUMN lost_tokens INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE files ADD COLUMN bad_rows INTEGER NOT NULL DEFAULT 0;
    """,
    """
    ALTER TABLE files ADD COLUMN held_out INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE steps ADD COLUMN replayed INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE steps ADD COLUMN anchor REAL;

    CREATE TABLE replayed_rows (
        file_id INTEGER NOT NULL REFERENCES files (id),
        step INTEGER NOT NULL,
        place INTEGER NOT NULL,
        sha256 TEXT NOT NULL,
        row INTEGER NOT NULL,
        PRIMARY KEY (file_id, step, place)
    ) STRICT, WITHOUT ROWID;
    """,
    """
    ALTER TABLE files ADD COLUMN accepted INTEGER NOT NULL DEFAULT 0;
    """,
    """
    CREATE TABLE step_times (
        file_id INTEGER NOT NULL,
        step INTEGER NOT NULL,
        time REAL NOT NULL,
        PRIMARY KEY (file_id, step),
        FOREIGN KEY (file_id, step) REFERENCES steps (file_id, step) ON DELETE CASCADE
    ) STRICT, WITHOUT ROWID;
    """,
    """
    CREATE TABLE rewinds (
        id INTEGER PRIMARY KEY,
        step INTEGER NOT NULL,
        created REAL NOT NULL
    ) STRICT;

    CREATE TABLE trackers (
        name TEXT PRIMARY KEY,
        run_id TEXT,
        step INTEGER NOT NULL,
        shift INTEGER NOT NULL,
        since INTEGER NOT NULL,
        rollbacks INTEGER NOT NULL,
        rewind INTEGER NOT NULL,
        problem TEXT,
        updated REAL NOT NULL
    ) STRICT;
    """,
    """
    CREATE TABLE step_ranges (
        file_id INTEGER NOT NULL REFERENCES files (id),
        first INTEGER NOT NULL,
        last INTEGER NOT NULL,
        steps INTEGER NOT NULL,
        rows INTEGER NOT NULL,
        replayed INTEGER NOT NULL,
        tokens INTEGER NOT NULL,
        seconds REAL,
        loss REAL,
        loss_min REAL,
        loss_max REAL,
        grad_norm REAL,
        grad_norm_min REAL,
        grad_norm_max REAL,
        learning_rate REAL,
        PRIMARY KEY (file_id, first)
    ) STRICT, WITHOUT ROWID;
    INSERT INTO step_ranges
    SELECT r.*, (SELECT learning_rate FROM steps WHERE file_id = r.file_id AND step = r.last)
    FROM (
        SELECT file_id, min(step) AS first, max(step) AS last, count(*), sum(rows), sum(replayed), sum(tokens),
            sum(seconds), sum(loss), min(loss), max(loss), sum(grad_norm), min(grad_norm), max(grad_norm)
        FROM steps WHERE file_id IN (SELECT id FROM files WHERE state = 'done')
        GROUP BY file_id, (step - 1) / 512
    ) r;
    """,
    """
    ALTER TABLE files ADD COLUMN token_digest TEXT;
    """,
)


def migrate(connection: sqlite3.Connection) -> None:
    """Bring a ledger's schema up to date, each migration in a transaction of its own; others may do so meanwhile.

    Raises:
        OnwardError: the ledger was written by a newer release.
        sqlite3.OperationalError: others hold it, or the machine fails.
    """
    if _known_version(connection) == len(MIGRATIONS):
        return
    connection.execute("PRAGMA foreign_keys = OFF")  # a table is rebuilt under its name, as SQLite advises
    try:
        while _migrate_once(connection):
            pass
    finally:
        connection.execute("PRAGMA foreign_keys = ON")


def _migrate_once(connection: sqlite3.Connection) -> bool:
    """Apply the next migration, if there is one; return whether there was."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = _known_version(connection)  # read under the lock: another process may just have done the same
        is_old = version < len(MIGRATIONS)
        if is_old:
            for statement in MIGRATIONS[version].split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {version + 1}")
        connection.execute("COMMIT")
    except BaseException:
        connection.rollback()
        raise
    return is_old


def is_newer(version: int) -> bool:
    """Whether a schema is one that only a newer release knows."""
    return version > len(MIGRATIONS)


def _known_version(connection: sqlite3.Connection) -> int:
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if is_newer(version):
        raise OnwardError(
            f"the ledger has schema {version}, this release knows {len(MIGRATIONS)}",
            hint=NEWER_RELEASE,
        )
    return version


def fill_in(connection: sqlite3.Connection) -> bool:
    """Let a connection that only reads an earlier release's ledger see all tables and columns of today.

    Missing tables are empty, and missing columns have their defaults, by views that exist for this connection alone.

    Returns:
        Whether there are such views: they would hide what a migration adds later.

    Raises:
        OnwardError: the ledger was written by a newer release.
    """
    if _known_version(connection) == len(MIGRATIONS):
        return False
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as today:
        migrate(today)
        connection.execute("PRAGMA temp_store = MEMORY")  # the disk may be full
        for (table,) in today.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            there = {name for _, name, *_ in connection.execute(f"PRAGMA main.table_info({table})")}
            columns = today.execute(f"PRAGMA table_info({table})").fetchall()
            missing = [f"{default or 'NULL'} AS {name}" for _, name, _, _, default, _ in columns if name not in there]
            if missing:
                rows = f"SELECT *, {', '.join(missing)} FROM main.{table}"
                none = f"SELECT {', '.join(missing)} WHERE 0"
                connection.execute(f"CREATE TEMP VIEW {table} AS {rows if there else none}")
    return True
