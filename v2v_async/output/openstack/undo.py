"""What is removed from a cloud again: images, volumes, attachments; and what could not be."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import anyio

from v2v_async.errors import V2VError
from v2v_async.events import Reporter
from v2v_async.openstack_cloud import Cloud, Login, connected
from v2v_async.v2vdir import MadeObject, V2VDir

UNDO_TIMEOUT_S = 40.0
"""Less than what guest.py gives to abandon: there must be time to tell what is left."""

Remove = Callable[[Cloud, MadeObject], Awaitable[None]]
"""Removes one object; raises TargetError where it stays. One that is gone already is no error."""


async def remove_made(
    v2vdir: V2VDir, login: Login, kinds: Sequence[str], remove: Remove, reporter: Reporter
) -> None:
    """Remove the objects of ``state.json`` whose kind begins so, all at once. Never fails.

    What stays is told with the command that removes it, and stays in ``state.json``.
    """
    made = [each for each in v2vdir.state.objects if each.kind.startswith(tuple(kinds))]
    if not made:
        return
    problems: dict[MadeObject, str] = {}

    async def remove_one(cloud: Cloud, each: MadeObject) -> None:
        try:
            await remove(cloud, each)
        except V2VError as error:
            problems[each] = error.message
        else:
            v2vdir.forget_object(each)

    with anyio.move_on_after(UNDO_TIMEOUT_S, shield=True):
        try:
            async with connected(login) as cloud:
                await cloud.log_in()
                async with anyio.create_task_group() as tasks:
                    for each in made:
                        tasks.start_soon(remove_one, cloud, each)
        except V2VError as error:
            problems = dict.fromkeys(made, error.message)
    left = v2vdir.state.objects
    for each in made:
        if each in left:
            why = problems.get(each, f"not done within {UNDO_TIMEOUT_S:.0f} s")
            reporter.warning(
                f"the {each.kind} ({each.name}) may be left in the cloud: {why}; "
                f"remove it with: {each.undo}"
            )
