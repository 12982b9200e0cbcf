"""What a changed config means: which step, which refusal, and nothing when nothing changed."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmblkd.config import Config, DaemonConfig, FuseConfig, NamespaceConfig, NbdConfig, RaidConfig
from pmblkd.reload_plan import Plan, plan

UNIT = 64 * 4096


def namespace(name: str = "a", **changes: Any) -> NamespaceConfig:
    fields: dict[str, Any] = {"name": name, "path": f"/m/{name}.img", "size": 4 * UNIT}
    return NamespaceConfig(**{**fields, **changes})


def config(*namespaces: NamespaceConfig, **changes: Any) -> Config:
    fields: dict[str, Any] = {"nbd": NbdConfig(listen=["unix:/run/n.sock"])}
    return Config(namespace=list(namespaces) or [namespace()], **{**fields, **changes})


def actions(made: Plan) -> dict[str, list[Any]]:
    """The steps that are there, by names."""
    found = msgspec.structs.asdict(made)
    for step in ("add", "switch", "grow"):
        found[step] = [one.name for one in found[step]]
    found["refused"] = [refusal.key for refusal in made.refused]
    return {step: names for step, names in found.items() if names}


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, {}),
        ({"representation": "pfn"}, {"switch": ["a"]}),
        ({"representation": {"kind": "extent", "fragments": 1}}, {}),
        ({"representation": {"kind": "extent", "fragments": 4}}, {"switch": ["a"]}),
        ({"size": 8 * UNIT}, {"grow": ["a"]}),
        ({"size": "2MiB"}, {"grow": ["a"]}),
        ({"size": None}, {}),
        ({"size": 2 * UNIT}, {"refused": ["namespace.a.size"]}),
        ({"path": "/m/other.img"}, {"refused": ["namespace.a.path"]}),
        ({"path": "/m/other.img", "size": UNIT}, {"refused": ["namespace.a.path"]}),
        ({"lba_size": 512}, {"refused": ["namespace.a.lba_size"]}),
        ({"read_only": True}, {"refused": ["namespace.a.read_only"]}),
        ({"dax": "off"}, {"changed": ["namespace.a.dax"]}),
        ({"dax": "fast"}, {"changed": ["namespace.a.dax"]}),
        (
            {"dax": "off", "representation": "page-cache"},
            {"switch": ["a"], "changed": ["namespace.a.dax"]},
        ),
        ({"reserve": True}, {"refused": ["namespace.a.reserve"]}),
        (
            {"representation": {"kind": "struct-page", "memmap": "device"}},
            {"refused": ["namespace.a.representation"]},
        ),
        (
            {"representation": "pfn", "lba_size": 512, "size": 8 * UNIT},
            {"switch": ["a"], "grow": ["a"], "refused": ["namespace.a.lba_size"]},
        ),
    ],
    ids=str,
)
def test_each_change_of_a_namespace_is_its_step_or_its_refusal(
    changes: dict[str, Any], steps: dict[str, list[str]]
) -> None:
    assert actions(plan(config(), config(namespace(**changes)))) == steps


RAID: dict[str, Any] = {"members": ["/m/0", "/m/1"]}


def array(name: str = "array", **changes: Any) -> NamespaceConfig:
    return NamespaceConfig(name=name, raid=RaidConfig(**{**RAID, **changes}))


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, {}),
        ({"members": ["/m/0"]}, {"refused": ["namespace.array.raid.members"]}),
        (
            {"degraded": True, "sweep_max": "1GiB"},
            {"refused": ["namespace.array.raid.degraded", "namespace.array.raid.sweep_max"]},
        ),
    ],
    ids=str,
)
def test_what_is_said_of_an_array_needs_a_restart(
    changes: dict[str, Any], steps: dict[str, list[str]]
) -> None:
    old = config(namespace(), array())
    assert actions(plan(old, config(namespace(), array(**changes)))) == steps


def test_arrays_come_and_go_and_one_whose_member_is_still_held_waits() -> None:
    assert actions(plan(config(), config(namespace(), array()))) == {"add": ["array"]}
    assert actions(plan(config(namespace(), array()), config())) == {"remove": ["array"]}
    other = array("other", members=["/m/2", "/m/1"])
    made = plan(config(namespace(), array()), config(namespace(), other))
    assert actions(made) == {
        "remove": ["array"],
        "refused": ["namespace.other.raid.members[1]"],
    }
    assert made.refused[0].reason == "array still has /m/1; reload again when it is gone"


def test_a_file_that_becomes_an_array_needs_a_restart() -> None:
    made = plan(config(namespace("a")), config(array("a")))
    assert actions(made) == {"refused": ["namespace.a.path", "namespace.a.raid"]}


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"reserve": True}, {"switch": ["a"]}),
        ({}, {"switch": ["a"], "refused": ["namespace.a.reserve"]}),
        ({"representation": {"kind": "struct-page", "memmap": "device"}}, {}),
    ],
    ids=str,
)
def test_a_reserve_stays_until_a_restart(
    changes: dict[str, Any], steps: dict[str, list[str]]
) -> None:
    """As served after a start with a page table on the device."""
    table = {"kind": "struct-page", "memmap": "device"}
    old = config(namespace(reserve=True, representation=table))
    assert actions(plan(old, config(namespace(**changes)))) == steps


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"nbd": None}, {"refused": ["nbd"]}),
        ({"fuse": FuseConfig(mountpoint="/m")}, {"refused": ["fuse"]}),
        ({"nbd": NbdConfig(listen=["tcp:h:1"])}, {"changed": ["nbd.listen"]}),
        (
            {"nbd": NbdConfig(listen=["unix:/run/n.sock"], default="a", max_connections=5)},
            {"changed": ["nbd.max_connections"]},
        ),
        (
            {"daemon": DaemonConfig(stop_seconds=1, busy_poll_us=0, log_level="error")},
            {"changed": ["daemon.stop_seconds", "daemon.busy_poll_us", "daemon.log_level"]},
        ),
    ],
    ids=str,
)
def test_each_setting_is_changed_or_refused_by_its_key(
    changes: dict[str, Any], steps: dict[str, list[str]]
) -> None:
    assert actions(plan(config(), config(**changes))) == steps


def test_the_mount_and_the_control_socket_stay_until_a_restart() -> None:
    old = config(fuse=FuseConfig(mountpoint="/m"))
    new = msgspec.convert(
        {
            **msgspec.to_builtins(old),
            "fuse": {"mountpoint": "/n", "allow_other": True},
            "control": {"socket": "/c"},
        },
        Config,
    )
    refused = ["fuse.mountpoint", "fuse.allow_other", "control.socket"]
    assert actions(plan(old, new)) == {"refused": refused}


@pytest.mark.parametrize(
    "changes",
    [
        {"engine": "kernel"},
        {"owner": "root:root"},
        {"mode": "0660"},
        {"options": ["ro"]},
        {"punch": True},
        {"request_timeout_seconds": 30},
    ],
    ids=str,
)
def test_what_a_mount_is_stays_until_a_restart(changes: dict[str, Any]) -> None:
    old = config(fuse=FuseConfig(mountpoint="/m"))
    new = config(fuse=FuseConfig(mountpoint="/m", **changes))
    assert actions(plan(old, new)) == {"refused": [f"fuse.{key}" for key in changes]}


def test_namespaces_come_and_go_and_the_first_one_is_the_default() -> None:
    made = plan(config(namespace("a"), namespace("b")), config(namespace("b"), namespace("c")))
    assert actions(made) == {"add": ["c"], "remove": ["a"], "changed": ["nbd.default"]}


def test_what_drains_cannot_come_back_before_it_is_gone() -> None:
    made = plan(
        config(namespace("b")), config(namespace("b"), namespace("a")), draining=[namespace("a")]
    )
    assert actions(made) == {"refused": ["namespace.a"]}
    assert "still draining" in made.refused[0].reason


def test_another_name_for_a_file_waits_until_the_first_one_is_gone() -> None:
    renamed = namespace("b", path="/m/a.img")
    made = plan(config(namespace("a")), config(renamed))
    assert made.remove == ["a"]
    assert made.add == []
    assert made.refused[0].key == "namespace.b.path"
    assert "a still has the file" in made.refused[0].reason


# ---- any change


REPRESENTATIONS = st.sampled_from(
    [
        "extent",
        "pfn",
        {"kind": "extent", "fragments": 3},
        {"kind": "page-cache", "arena": "1MiB"},
        {"kind": "struct-page", "memmap": "device"},
    ]
)
NAMESPACES = st.lists(
    st.builds(
        namespace,
        name=st.sampled_from("abcd"),
        size=st.sampled_from([None, UNIT, 2 * UNIT, 3 * UNIT]),
        lba_size=st.sampled_from([512, 4096]),
        reserve=st.booleans(),
        representation=REPRESENTATIONS,
    ),
    min_size=1,
    unique_by=lambda one: one.name,
)
CONFIGS = st.builds(lambda namespaces, **rest: config(*namespaces, **rest), NAMESPACES)


def as_served(one: NamespaceConfig) -> NamespaceConfig:
    """A namespace right after its opening: it has a size, and says whether it has a reserve."""
    return msgspec.structs.replace(one, size=one.size or UNIT, reserve=one.with_reserve)


def carried_out(old: Config, steps: Plan, *, default: str) -> Config:
    """What is served when every step has been taken."""
    served = {one.name: one for one in old.namespace if one.name not in steps.remove}
    for one in steps.switch:
        before = served[one.name]
        served[one.name] = msgspec.structs.replace(before, representation=one.representation)
    for one in steps.grow:
        served[one.name] = msgspec.structs.replace(served[one.name], size=one.size)
    served |= {one.name: as_served(one) for one in steps.add}
    assert old.nbd is not None
    nbd = msgspec.structs.replace(old.nbd, default=default)
    return msgspec.structs.replace(old, namespace=list(served.values()), nbd=nbd)


@given(CONFIGS)
def test_the_same_config_again_changes_nothing(one: Config) -> None:
    served = msgspec.structs.replace(one, namespace=[as_served(each) for each in one.namespace])
    assert actions(plan(served, one)) == {}


@given(CONFIGS, CONFIGS)
def test_a_second_reload_does_nothing_and_names_what_was_refused_again(
    first: Config, second: Config
) -> None:
    old = msgspec.structs.replace(first, namespace=[as_served(each) for each in first.namespace])
    made = plan(old, second)
    again = plan(carried_out(old, made, default=second.default_export), second)
    assert set(actions(again)) <= {"refused"}
    assert again.refused == made.refused


@given(CONFIGS, CONFIGS)
def test_every_namespace_is_kept_added_or_removed_and_never_two_of_them(
    first: Config, second: Config
) -> None:
    old = msgspec.structs.replace(first, namespace=[as_served(each) for each in first.namespace])
    made = plan(old, second)
    before, after = ({one.name for one in each.namespace} for each in (old, second))
    assert set(made.remove) == before - after
    assert {one.name for one in made.add} == after - before
    assert {one.name for one in (*made.switch, *made.grow)} <= before & after
