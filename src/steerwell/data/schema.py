"""The tables of a store, and the rule that evidence is only ever added.

Messages, prompts, completions and annotations can't be updated or deleted: triggers refuse it, whoever asks.
Only ``steerwell`` (settings) and ``splits`` may change. SQLite is tested; the Postgres triggers say the same.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    create_engine,
    event,
    inspect,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.pool import StaticPool

from steerwell.data.errors import InputError

SCHEMA_VERSION = 1

tables = MetaData()
# SQLite gives an INTEGER PRIMARY KEY its own increasing numbers; that is the order things were added in.
_serial = BigInteger().with_variant(Integer(), "sqlite")
settings = Table("steerwell", tables, Column("key", Text, primary_key=True), Column("value", Text))
splits = Table("splits", tables, Column("root", Text, primary_key=True), Column("name", Text, nullable=False))
messages = Table(
    "messages",
    tables,
    Column("id", Text, primary_key=True),
    Column("parent", Text, nullable=False),  # "" before the first message
    Column("role", Text, nullable=False),
    Column("content", Text, nullable=False),
    Column("extra", Text, nullable=False),
    sqlite_with_rowid=False,
)
prompts = Table(
    "prompts",
    tables,
    Column("seq", _serial, primary_key=True),
    Column("id", Text, nullable=False, unique=True),  # the id of its last message
    Column("root", Text, nullable=False),
    Column("meta", Text, nullable=False),
)
blobs = Table(
    "blobs",
    tables,
    Column("id", Text, primary_key=True),
    Column("data", LargeBinary, nullable=False),
)
completions = Table(
    "completions",
    tables,
    Column("seq", _serial, primary_key=True),
    Column("id", Text, nullable=False, unique=True),
    Column("prompt_id", Text, ForeignKey("prompts.id"), nullable=False),
    Column("text_id", Text, nullable=False),  # the id of its last message
    Column("kind", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("revision", Text, nullable=False),
    Column("sampling", Text, nullable=False),
    Column("seed", BigInteger),
    Column("step", BigInteger),
    Column("sample", BigInteger, nullable=False),
    Column("token_ids", LargeBinary),
    Column("prompt_token_ids", Text, ForeignKey("blobs.id")),  # shared by the samples of one prompt
    Column("old_logps", LargeBinary),
    Column("finished", Boolean),
    Index("completions_by_prompt", "prompt_id"),
)
annotations = Table(
    "annotations",
    tables,
    Column("seq", _serial, primary_key=True),
    Column("id", Text, nullable=False, unique=True),
    Column("kind", Text, nullable=False),
    Column("annotator", Text, nullable=False),
    Column("criterion", Text, nullable=False),
    Column("value", Text, nullable=False),  # canonical JSON
    Column("strength", Float),
    Column("rationale", Text, nullable=False),
    Column("time", Text, nullable=False),
    Column("seconds", Float),
    Column("cost", Float),
    Column("order_known", Boolean, nullable=False),
)
shown = Table(
    "shown",
    tables,
    Column("annotation_id", Text, ForeignKey("annotations.id"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("completion_id", Text, ForeignKey("completions.id"), nullable=False),
    Index("shown_by_completion", "completion_id"),
    sqlite_with_rowid=False,
)
EVIDENCE = (messages, prompts, blobs, completions, annotations, shown)


def connect(url_or_path: str) -> Engine:
    """An engine for a path, ``:memory:`` or a database URL. SQLite: foreign keys, explicit transactions."""
    try:
        url = make_url(url_or_path) if "://" in url_or_path else URL.create("sqlite", database=url_or_path)
        if url.get_backend_name() != "sqlite":
            return create_engine(url)
        in_memory = url.database in (None, "", ":memory:")
        # One connection for a store in memory: another would see another, empty database.
        pool = {"poolclass": StaticPool} if in_memory else {}
        engine = create_engine(url, connect_args={"check_same_thread": False, "timeout": 30}, **pool)
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise InputError(
            f"can't open a store at {_without_password(url_or_path)}: {str(error).splitlines()[0]}",
            mend="Give a file name, or a URL whose database driver is installed.",
        ) from None

    @event.listens_for(engine, "connect")
    def _on_connect(connection, _record):  # the driver's own transaction handling is switched off
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection):
        write = connection.get_execution_options().get("write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def _without_password(url: str) -> str:
    """The text of a URL for a message: what stands before an @ is left out."""
    head, mark, rest = url.partition("://")
    return f"{head}{mark}{rest.rpartition('@')[2]}"


def lock_for_writing(connection: Connection) -> None:
    """One writer at a time. SQLite's ``BEGIN IMMEDIATE`` has done it; Postgres takes an advisory lock."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7337933537)")


def prepare(engine: Engine, name: str) -> None:
    """Create the tables of a new store, or check that the database is a store of a version we can read."""
    try:
        with engine.connect() as connection:
            present = set(inspect(connection).get_table_names())
        if not present:
            _create(engine)
            return
        if settings.name not in present:
            raise InputError(
                "this database is not a steerwell store", file=name, mend="Give another file name."
            )
        with engine.connect() as connection:
            version = connection.exec_driver_sql(
                "SELECT value FROM steerwell WHERE key = 'schema_version'"
            ).scalar()
    except DBAPIError as error:
        raise InputError(
            f"can't be opened as a store ({error.orig})",
            file=name,
            mend="Give a store made by steerwell, or a new file name.",
        ) from None
    if version is None or not version.isdigit():
        raise InputError("this store does not say its version", file=name, mend="Restore it from a copy.")
    if int(version) > SCHEMA_VERSION:
        raise InputError(
            f"this store has version {version}, this steerwell reads up to {SCHEMA_VERSION}",
            file=name,
            mend="Upgrade steerwell: pip install --upgrade steerwell.",
        )


def _create(engine: Engine) -> None:
    if engine.dialect.name == "sqlite" and engine.url.database not in (None, "", ":memory:"):
        raw = engine.raw_connection()
        try:
            raw.cursor().execute("PRAGMA journal_mode=WAL")  # kept in the file; impossible in a transaction
        finally:
            raw.close()
    with engine.connect().execution_options(write=True) as connection, connection.begin():
        lock_for_writing(connection)
        tables.create_all(connection)
        for table in EVIDENCE:
            for statement in _triggers(table.name, engine.dialect.name):
                connection.exec_driver_sql(statement)
        known = settings.select().where(settings.c.key == "schema_version")
        if connection.execute(known).first() is None:
            connection.execute(settings.insert(), {"key": "schema_version", "value": str(SCHEMA_VERSION)})


def _triggers(table: str, dialect: str) -> list[str]:
    if dialect == "sqlite":
        return [
            f"CREATE TRIGGER IF NOT EXISTS {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
            f"BEGIN SELECT RAISE(ABORT, 'evidence is append-only: {table}'); END"
            for verb in ("UPDATE", "DELETE")
        ]
    return [
        "CREATE OR REPLACE FUNCTION steerwell_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'evidence is append-only: %%', TG_TABLE_NAME; END $$",
        f"CREATE OR REPLACE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE ON {table} "
        "FOR EACH ROW EXECUTE FUNCTION steerwell_append_only()",
    ]
