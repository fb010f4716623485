"""All checkpoints of one folder, behind Orbax.

On disk a step is `FOLDER/<step>/` with the arrays in `state/` (nested plain dicts by
the path names of the leaves, written by Orbax) and `manifest/data.json` (see
`manifest.py`: types, shapes and checksums of the leaves, and the caller's data).
Orbax writes a step under a temporary name and renames it when it is complete; both
parts are there or neither is.

What Orbax lacks and this module adds: checksums of leaves and experts (a flipped bit in
the arrays is loaded silently otherwise), a return to the step before when the newest is
damaged, and a readable difference when the checkpoint is of another model.

`gs://` and `s3://` folders are passed through to Orbax and etils; that has not been
run. Processes of one run must share the folder and call `save`, `wait`, `restore` and
`close` together; only process 0 writes anything that Orbax does not.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from moe_jax.checkpoint import failures, folders, manifest, trees
from moe_jax.checkpoint.barriers import Barriers, in_background
from moe_jax.checkpoint.checksums import in_parts
from moe_jax.checkpoint.failures import (
    DamagedError,
    SaveError,
    on_all_processes,
    reason,
)
from moe_jax.config import CheckpointConfig
from moe_jax.errors import UserError

_STATE, _MANIFEST = "state", "manifest"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """What was loaded.

    Attributes:
      step: its number.
      state: pytree of the structure asked for.
      data: what was given to `save` with it, after a trip through JSON.
      notes: lines that the user should see: what was damaged and skipped.
    """

    step: int
    state: Any
    data: dict
    notes: list[str]


class Checkpoints:
    """All checkpoints of one workdir: async save, keep policy, verified restore."""

    def __init__(
        self,
        folder: str,
        config: CheckpointConfig,
        *,
        read_only: bool = False,
        experts: Mapping[str, int] | None = None,
    ):
        """Opens a folder; a writer makes it and clears away unfinished saves.

        Args:
          folder: local path or bucket address.
          config: when to save and what to keep.
          read_only: never write, delete or create anything.
          experts: which dimension of a leaf counts experts, by the leaf's name; these
            get a checksum each. Restoring does not need it.

        Raises:
          UserError: the folder cannot be made or read.
        """
        self._folder = epath.Path(folder).expanduser()
        if "://" not in str(folder):
            self._folder = self._folder.absolute()  # Orbax refuses relative paths.
        self._config = config
        self._read_only = read_only
        self._experts = dict(experts or {})
        self._pending: tuple[int, Any] | None = None
        self._superseded: list[int] = []
        self._mended: list[str] = []
        try:
            if not read_only:
                self._mend()
            self._open()
        except OSError as error:
            raise UserError(f"checkpoint folder {folder}: {reason(error)}") from error

    def _mend(self) -> None:
        if jax.process_index() == 0:
            self._mended = folders.mend(self._folder)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("moe_jax.checkpoint:mend")

    def _open(self) -> None:
        self._manager = None
        self._hollow: list[int] = []
        if self._read_only and not self._folder.exists():
            return
        policies = ocp.training.preservation_policies
        keep = [policies.LatestN(self._config.keep_last)]
        if self._config.keep_every:
            keep.append(policies.EveryNSteps(self._config.keep_every))
        registry = ocp.handlers.local_registry()
        # Without this a dict would be stored as a tree of numbers.
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=_MANIFEST)
        self._barriers = Barriers()
        options = in_background(self._barriers, self._config.watchdog_secs)
        context = ocp.Context(async_options=options)
        context.checkpointables.registry = registry
        context.pytree.loading.partial_load = True
        try:
            self._manager = ocp.training.Checkpointer(
                self._folder,
                context=context,
                preservation_policy=policies.AnyPreservationPolicy(keep),
                cleanup_tmp_directories=not self._read_only,
            )
        except OSError:
            raise
        except Exception as error:
            raise folders.unlistable(self._folder, error) from None
        self._find_hollow()

    def _find_hollow(self) -> None:
        # Orbax takes any folder with a number for a checkpoint, an empty one too.
        self._hollow = [
            c.step for c in self._manager.checkpoints if not folders.has_entries(c.path)
        ]

    def save(self, step: int, state: Any, data: dict, *, force: bool = False) -> bool:
        """Saves if `step` is a multiple of `config.every`, or by force.

        Returns when the arrays are copied to the host, so their buffers may be donated
        at once; writing goes on in the background. Waits for the save before it. A
        step that exists already is left as it is.

        The first save after `restore` moves the steps that came after the restored
        one (damaged, or of a future that is now another one) to `FOLDER/set_aside`.

        Args:
          step: number of the step.
          state: pytree of jax.Array.
          data: small JSON object kept with it; process 0's is written.
          force: save whatever `config.every` says.

        Returns:
          Whether a save was begun.

        Raises:
          SaveError: this save, or the one before it in the background, failed. The
            checkpoints before it are untouched.
        """
        if self._read_only:
            raise ValueError("these checkpoints were opened read-only")
        if not force and step % self._config.every:
            return False
        self.wait()
        try:
            self._clear_the_way()
            if step in self.steps():
                return False
            leaves = trees.named_leaves(state)
            parts = in_parts(leaves, self._experts)
            contents = manifest.make(step, data, leaves, parts, self._experts)
            # Orbax refuses arrays without elements; the manifest has them.
            stored = {name: leaf for name, leaf in leaves.items() if leaf.size}
            response = self._manager.save_checkpointables_async(
                step,
                {_STATE: trees.nested(stored), _MANIFEST: contents},
                force=True,
            )
        except OSError as error:
            raise self._save_error(step, error) from error
        self._pending = (step, response)
        return True

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
          SaveError: a save in the background failed.
        """
        if self._pending is None:
            return
        (step, response), self._pending = self._pending, None
        try:
            response.result()
        except Exception as error:
            raise self._save_error(step, error) from error

    def is_saving(self) -> bool:
        """Whether a save goes on in the background."""
        begun = self._pending is not None and not self._barriers.broken
        return begun and self._manager.is_saving_in_progress()

    def probe(self) -> str:
        """Why nothing can be written to the folder now, or ""."""
        return failures.probe(self._folder)

    def forget(self) -> None:
        """After a save that failed: the folder is listed anew when it is next used.

        All processes must call it, those too in which nothing failed.
        """
        failures.hide_loose_ends()
        self._manager = None

    def close(self) -> None:
        """Waits and frees resources; to be called once, at the end.

        Raises:
          SaveError: a save in the background failed.
        """
        try:
            self.wait()
        finally:
            if self._manager is not None:
                self._manager.close()
                self._manager = None

    def steps(self) -> list[int]:
        """The complete steps there are, in ascending order; they may be damaged."""
        if self._read_only or self._manager is None:
            self._refresh()
        if self._manager is None:
            return []
        found = [c.step for c in self._manager.checkpoints]
        return [step for step in found if step not in self._hollow]

    def restore(
        self, abstract_state: Any, *, step: int | None = None
    ) -> Restored | None:
        """Loads the newest step that is whole, or the one asked for.

        Args:
          abstract_state: pytree of jax.ShapeDtypeStruct with the shardings wanted.
          step: load this one and no other.

        Returns:
          None where there is no checkpoint at all.

        Raises:
          UserError: all steps are damaged; or the one asked for is damaged or missing;
            or the checkpoint is of another model (with the differences; types count,
            nothing is cast).
        """
        restored = self._restore(abstract_state, "", step)
        if restored is not None and not self._read_only:
            restored.notes[:0] = self._mended
            self._superseded = [s for s in self.steps() if s > restored.step]
            if step is not None and self._superseded:
                restored.notes.append(
                    f"steps {self._superseded} are newer; the next save moves them to "
                    f"{self._folder / folders.SET_ASIDE}"
                )
        return restored

    def restore_subtree(
        self, abstract: Any, prefix: str, *, step: int | None = None
    ) -> Restored | None:
        """Loads only the leaves below `prefix`, such as "params".

        As `restore`, with `abstract` a pytree in the place of that part of the state.
        """
        return self._restore(abstract, prefix, step)

    def _restore(self, abstract: Any, prefix: str, step: int | None) -> Restored | None:
        self.wait()
        targets = trees.named_leaves(abstract, prefix)
        trees.check_targets(targets)
        steps = self.steps()
        if step is not None and step not in steps:
            raise UserError(f"no step {step} in {self._folder}; {_there_are(steps)}")
        damaged: list[tuple[int, str]] = []
        for candidate in reversed(steps) if step is None else [step]:
            try:
                leaves, data = self._load(candidate, targets, prefix)
            except DamagedError as error:
                damaged.append((candidate, str(error)))
                continue
            notes = [
                f"step {s} is damaged ({why}); using step {candidate}"
                for s, why in damaged
            ]
            state = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
            return Restored(step=candidate, state=state, data=data, notes=notes)
        if not damaged:
            return None
        lines = [f"step {s} is damaged ({why})" for s, why in damaged]
        if step is not None:
            raise UserError(f"{self._folder}: {lines[0]}; {_there_are(steps)}")
        raise UserError(
            f"every checkpoint in {self._folder} is damaged; move the folder away to "
            "begin anew\n" + "\n".join(f"  {line}" for line in lines)
        )

    def _load(
        self, step: int, targets: Mapping[str, Any], prefix: str
    ) -> tuple[list[jax.Array], dict]:
        """The leaves in the order of `targets`, and the caller's data."""

        def read_manifest():
            found = self._manager.load_checkpointables(step, {_MANIFEST: None})
            return found[_MANIFEST], manifest.check(found[_MANIFEST], step)

        contents, dims = on_all_processes(read_manifest)
        saved = {
            name: entry
            for name, entry in contents["leaves"].items()
            if not prefix or name == prefix or name.startswith(prefix + "/")
        }
        lines = trees.differences(
            {name: entry["array"] for name, entry in saved.items()},
            {name: trees.describe(target) for name, target in targets.items()},
        )
        if lines:
            raise UserError(
                f"step {step} of {self._folder} does not fit this config "
                "(checkpoint -> config):\n" + "\n".join(f"  {line}" for line in lines)
            )
        manifest.check_layout(step, dims, self._experts)
        leaves = on_all_processes(lambda: self._read_arrays(step, targets))
        found = in_parts(leaves, dims)
        manifest.verify(contents, found)
        return list(leaves.values()), contents["data"]

    def _read_arrays(
        self, step: int, targets: Mapping[str, Any]
    ) -> dict[str, jax.Array]:
        stored = {
            name: jax.ShapeDtypeStruct(t.shape, t.dtype, sharding=t.sharding)
            for name, t in targets.items()
            if t.size
        }
        leaves = {}
        if stored:
            tree = {_STATE: trees.nested(stored)}
            found = self._manager.load_checkpointables(step, tree)[_STATE]
            leaves = trees.named_leaves(found)
            # Of a leaf that its index lacks Orbax gives back what it was asked for.
            lost = [n for n in stored if not isinstance(leaves.get(n), jax.Array)]
            if lost:
                raise ValueError(f"leaf {lost[0]} is not among its arrays")
        return {
            name: leaves[name]
            if name in stored
            else jnp.zeros(t.shape, t.dtype, device=t.sharding)
            for name, t in targets.items()
        }

    def _clear_the_way(self) -> None:
        """Removes what would get between a resumed run and its next save."""
        hollow, aside = self._hollow, self._superseded
        if not hollow and not aside:
            return
        if jax.process_index() == 0:
            for step in hollow:
                (self._folder / str(step)).rmdir()
            for step in aside:
                folders.set_aside(self._folder, step)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("moe_jax.checkpoint:set_aside")
        self._superseded = []
        self._refresh()

    def _refresh(self) -> None:
        """Reads the list of steps from disk again."""
        if self._manager is None:
            self._open()
        else:
            self._manager.reload()
            self._find_hollow()

    def _save_error(self, step: int, error: Exception) -> SaveError:
        # A failed save leaves the manager with a step that is not there.
        self.forget()
        return SaveError(
            f"saving step {step} in {self._folder} failed: {reason(error)}"
        )


def _there_are(steps: list[int]) -> str:
    return f"there are steps {steps}" if steps else "there are no steps"
