"""The commands of `raymill` that look at checkpoints. Each imports what it alone needs. The
commands that look at runs are wings'."""

from cluster.commands.arguments import CHECKPOINT, STORAGE
from cluster.commands.command import Arguments, Command, CommandSection, Result
from cluster.output.progress import say
from cluster.storage.uris import open_storage


def checkpoint_show(arguments: Arguments) -> Result:
    """Returns what a checkpoint holds; for a damaged one `valid` is false and `problems` says
    why."""
    from cluster.storage.references import checkpoint_uri
    from cluster.storage.registry import LATEST, named_checkpoint, resolve_checkpoint
    from model.files.checkpoint_folder import read_metadata, verify_checkpoint

    storage_uri = arguments[STORAGE]
    reference = checkpoint_uri(arguments[CHECKPOINT], storage_uri)
    folder = None if reference == LATEST else open_storage(reference).local_path("")
    is_here = folder is not None
    if folder is None:
        folder = resolve_checkpoint(reference, storage_uri)
    elif not folder.is_dir() or (folder / "checkpoints").is_dir():
        # None, or a run's: its newest checkpoint.
        folder = open_storage(named_checkpoint(reference, storage_uri)).local_path("")
        assert folder is not None, "it is below a folder that is here"
    # A copy of a remote one has no training state
    problems = verify_checkpoint(folder, to_train=is_here)
    metadata = {"parameter_hash": None} if problems else vars(read_metadata(folder))
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    checked = {
        "checkpoint": str(folder),
        "valid": not problems,
        "problems": problems,
        "files": files,
    }
    return Result(checked | metadata)


def checkpoint_list(arguments: Arguments) -> Result:
    """Lists what was published, oldest first, with its validation loss and whether `latest` means
    it."""
    from cluster.output.result_text import date_of, table
    from cluster.storage.registry import metadata_of, publications
    from model.files.checkpoint_folder import MANIFEST

    published = publications(open_storage(arguments[STORAGE]))
    usable = (
        entry for entry in reversed(published) if open_storage(entry.checkpoint).exists(MANIFEST)
    )
    latest = next(usable, None)
    rows, shown = [], []
    for publication in published:
        metadata = metadata_of(publication.checkpoint)
        is_latest, is_gone = publication is latest, metadata is None
        val_loss = metadata and metadata.val_loss
        row = vars(publication) | {"val_loss": val_loss, "is_latest": is_latest, "is_gone": is_gone}
        mark = "latest" if is_latest else "gone" if is_gone else ""
        rows.append(row)
        shown.append(row | {"published": date_of(publication.time), "latest": mark})
    if not rows:
        say(
            f"nothing is published in {arguments[STORAGE]}: a run that ends publishes its last checkpoint"
        )
    text = table(("published", "run_id", "step", "val_loss", "latest", "checkpoint"), shown)
    return Result({"published": rows}, text=text)


LOOK = CommandSection(
    "look at runs and checkpoints",
    (
        Command(
            "checkpoint show",
            "verify a checkpoint and print its hashes",
            checkpoint_show,
            [CHECKPOINT, STORAGE],
        ),
        Command("checkpoint list", "list the published checkpoints", checkpoint_list, [STORAGE]),
    ),
    groups={"checkpoint": "look at checkpoints"},
)
