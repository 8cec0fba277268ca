"""What a file of labels holds, by version."""

from concertmaster.state.database import Schema

SCHEMA = Schema(
    holds="labels",
    mark=0x434D4C42,
    shrinks=True,
    migrations=(
        (
            """
            CREATE TABLE calls (
              seq INTEGER PRIMARY KEY, request_id TEXT NOT NULL UNIQUE, workflow_id TEXT NOT NULL,
              app TEXT NOT NULL, template TEXT NOT NULL, role TEXT NOT NULL, step TEXT NOT NULL,
              stage INTEGER, arrival_s REAL NOT NULL, prompt_tokens INTEGER NOT NULL,
              max_output_tokens INTEGER NOT NULL, source TEXT NOT NULL, said_models TEXT NOT NULL,
              said BLOB, said_remaining_tokens BLOB, said_remaining_calls BLOB, said_tool_call REAL,
              features BLOB, embedding BLOB, prompt_text TEXT,
              serial INTEGER, success REAL, gpu TEXT, model TEXT, output_tokens INTEGER,
              tool_call INTEGER, finished_s REAL, remaining_tokens INTEGER, remaining_calls INTEGER
            )
            """,
            "CREATE INDEX calls_of_workflow ON calls (workflow_id)",
            "CREATE UNIQUE INDEX labels_in_order ON calls (serial) WHERE output_tokens IS NOT NULL",
            """
            CREATE TABLE workflows (
              seq INTEGER PRIMARY KEY, workflow_id TEXT NOT NULL UNIQUE, closed INTEGER NOT NULL,
              cut INTEGER NOT NULL, success REAL
            )
            """,
            "CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL)",
            "INSERT INTO counters VALUES ('serial', 0)",
        ),
    ),
)
