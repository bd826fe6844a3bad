"""Foreign objects in the `args` of a checkpoint: inert there, refused elsewhere, whatever the pickle does with them."""

import argparse
import collections
import io
import pickle
import subprocess
import sys
import types
import zipfile

import pytest
import torch

from avion.errors import UserError
from avion.weights.files import checkpoint_state_dict, read_checkpoint
from avion.weights.foreign import Foreign, table_columns
from tests.weights.checkpoints import FIXTURES
from tests.weights.upstream_files import ACTIONS, CLASSIFY, action_mappings

PANDAS = ("1.5", "1.5_legacy", "2.2", "3", "3_pyarrow")
FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])


def refusal(path) -> str:
    with pytest.raises(UserError) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


@pytest.fixture
def classes(monkeypatch):
    """Classes of a library that is gone again when the file is read."""
    module = types.ModuleType("somelib")
    for name, base in (("Thing", object), ("Settings", dict), ("Names", list)):
        kind = type(name, (base,), {"__module__": "somelib", "__qualname__": name})
        setattr(module, name, kind)
    monkeypatch.setitem(sys.modules, "somelib", module)
    return module


def saved(tmp_path, contents, zipped=True):
    torch.save(contents, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    sys.modules.pop("somelib", None)
    return tmp_path / "a.pt"


class Call:
    """Pickled as a call of a function with arguments, and a state to set afterwards."""

    def __init__(self, function, *args, state=None):
        self.parts = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.parts


# --- what upstream writes --------------------------------------------------------------------


@pytest.mark.parametrize("version", PANDAS)
def test_a_table_of_pandas_is_read_without_pandas(version, monkeypatch):
    for module in [m for m in sys.modules if m.split(".")[0] == "pandas"]:  # imported by a library of another test
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "pandas", None)  # whoever imports it now gets an ImportError
    checkpoint = read_checkpoint(FIXTURES / f"classifier_pandas{version}.pt")
    args = checkpoint["args"]
    assert isinstance(args.actions, Foreign) and "DataFrame, not loaded" in repr(args.actions)
    verbs, nouns = action_mappings()
    assert table_columns(args.actions) == {"verb": [*verbs.values()], "noun": [*nouns.values()]}
    assert (args.mapping_act2v, args.mapping_act2n) == (verbs, nouns)
    assert vars(args).items() >= CLASSIFY.items()  # all of the command line
    assert checkpoint["best_acc1"] == 44.5 and checkpoint["epoch"] == 100 and checkpoint["scaler"]["scale"] == 65536
    moments = checkpoint["optimizer"]["state"]
    weights = checkpoint_state_dict(checkpoint)
    assert [m["momentum_buffer"].shape for m in moments.values()] == [w.shape for w in weights.values()]
    assert all(w.device.type == "cpu" for w in weights.values())  # saved from GPU 0


@FORMATS
def test_objects_of_any_library_in_args(tmp_path, classes, zipped):
    thing, settings, names = classes.Thing(), classes.Settings(a=1, b=[2]), classes.Names([1, "x"])
    thing.size, settings.frozen = 3, True
    args = argparse.Namespace(
        thing=thing,
        kind=classes.Thing,
        settings=settings,
        names=names,
        lr=0.1,
        size=torch.ones(2),
        area=slice(1, 5, 2),
        counts=collections.defaultdict(int, {"a": 2}),
    )
    found = read_checkpoint(saved(tmp_path, {"state_dict": {"w": torch.ones(2)}, "args": args}, zipped))["args"]
    assert "somelib" not in sys.modules
    assert (found.thing.path, found.thing.state) == ("somelib.Thing", {"size": 3}) and not hasattr(found.thing, "size")
    assert issubclass(found.kind, Foreign)
    assert found.settings == {"a": 1, "b": [2]} and found.names == [1, "x"] and found.lr == 0.1
    assert found.counts == {"a": 2} and found.size.tolist() == [1, 1] and found.area.args == (1, 5, 2)


def test_args_that_are_an_object_of_a_library(tmp_path, classes):
    path = saved(tmp_path, {"state_dict": {"w": torch.ones(2)}, "args": classes.Thing()})
    assert isinstance(read_checkpoint(path)["args"], Foreign)


# --- anywhere else ---------------------------------------------------------------------------


def _outside(lib):
    ordered = collections.OrderedDict(w=torch.ones(2))
    ordered.attribute = lib.Thing()
    tensor, shared = torch.nn.Parameter(torch.ones(2)), lib.Thing()
    tensor.attribute = lib.Thing()
    weights = {"state_dict": {"w": torch.ones(2)}}
    return {
        "for a tensor": {"state_dict": {"w": lib.Thing()}},
        "the class for a tensor": {"state_dict": {"w": lib.Thing}},
        "as a name": {"state_dict": {lib.Thing(): torch.ones(2)}},
        "for the weights": {"state_dict": lib.Thing()},
        "a dict of its own": {"state_dict": lib.Settings(w=torch.ones(2))},
        "a list of its own": {**weights, "optimizer": {"groups": lib.Names([1])}},
        "an attribute of the weights": {"state_dict": ordered},
        "an attribute of a tensor": {"state_dict": {"w": tensor}},
        "deep": {**weights, "optimizer": {"groups": [(1, {"x": [lib.Thing()]})]}},
        "a field": {**weights, "model": lib.Thing()},
        "a field's name": {**weights, lib.Thing(): 1},
        "in another namespace": {**weights, "config": argparse.Namespace(x=lib.Thing())},
        "of args as well": {**weights, "args": argparse.Namespace(x=shared), "also": [shared]},
        "everything": lib.Thing(),
        "everything, as a dict": lib.Settings(weights),
        "below args": {"state_dict": {"w": torch.ones(2), "args": lib.Thing()}},
    }


@FORMATS
@pytest.mark.parametrize("where", _outside(types.SimpleNamespace(Thing=object, Settings=dict, Names=list)))
def test_foreign_objects_outside_args_are_refused(tmp_path, classes, where, zipped):
    path = saved(tmp_path, _outside(classes)[where], zipped)
    text = refusal(path)
    assert "somelib." in text and "is code and not weights" in text and "get the checkpoint from its authors" in text


# --- hostile ---------------------------------------------------------------------------------

ACTING = {
    "open": lambda marker: (open, marker, "w"),
    "eval": lambda marker: (eval, f"open({marker!r}, 'w')"),
    "exec": lambda marker: (exec, f"open({marker!r}, 'w')"),
    "run": lambda marker: (subprocess.check_call, ["touch", marker]),
    "Popen": lambda marker: (subprocess.Popen, ["touch", marker]),
    "loads": lambda marker: (pickle.loads, pickle.dumps(Call(open, marker, "w"))),
    "zip": lambda marker: (zipfile.ZipFile, marker, "w"),
}


@FORMATS
@pytest.mark.parametrize("place", ["args", "in args", "state", "state_dict"])
@pytest.mark.parametrize("how", ACTING)
def test_functions_that_act_are_refused_in_args_too(tmp_path, how, place, zipped):
    marker = tmp_path / "marker"
    call = Call(*ACTING[how](str(marker)))
    contents = {"state_dict": {"w": torch.ones(2)}}
    if place == "state_dict":
        contents["state_dict"]["w"] = call
    elif place == "state":
        contents["args"] = Call(argparse.Namespace, state={"x": call})
    else:
        contents["args"] = call if place == "args" else argparse.Namespace(model=[call])
    assert "is code and not weights" in refusal(saved(tmp_path, contents, zipped))
    assert not marker.exists()


def test_the_shell_is_refused(tmp_path):
    import os

    contents = {"args": Call(os.system, f"touch {tmp_path / 'marker'}"), "state_dict": {"w": torch.ones(1)}}
    assert "system" in refusal(saved(tmp_path, contents)) and not (tmp_path / "marker").exists()


def test_functions_of_installed_libraries_are_not_called(tmp_path):
    """They lie about as stand-ins, even where the library is there."""
    marker = tmp_path / "marker"
    args = argparse.Namespace(a=Call(torch.save, {}, str(marker)), b=Call(torch.hub.load, "x", state={"y": 1}))
    found = read_checkpoint(saved(tmp_path, {"state_dict": {"w": torch.ones(1)}, "args": args}))["args"]
    assert not marker.exists() and found.a.path == "torch.serialization.save" and found.b.state == {"y": 1}


def test_stand_ins_keep_what_is_done_to_them_to_themselves(tmp_path, classes):
    """A state full of special names, a second state, a call with anything; and what is called must be a name."""
    thing = {"__class__": int, "__setstate__": 1, "path": "x", "args": 1, "__dict__": {}}
    args = argparse.Namespace(
        a=Call(classes.Thing, state=thing), b=Call(classes.Thing, [1], {"x": 2}, state=({"a": 1}, {"path": 3}))
    )
    found = read_checkpoint(saved(tmp_path, {"state_dict": {"w": torch.ones(1)}, "args": args}))["args"]
    assert (found.a.path, found.a.args, found.b.path, found.b.args) == (
        "somelib.Thing",
        (),
        "somelib.Thing",
        ([1], {"x": 2}),
    )
    assert found.b.state == ({"a": 1}, {"path": 3}) and isinstance(found.a.state, dict)
    for what in (b"csomelib\nThing\n)R)R", b"csomelib\nThing\n)R}R", b"csomelib\nThing\n}b"):
        path = archive(tmp_path, b"\x80\x02}X\x04\x00\x00\x00args" + what + b"s.")
        assert refusal(path)


def archive(tmp_path, data, compression=zipfile.ZIP_STORED):
    """A file of torch.save with another pickle."""
    buffer = io.BytesIO()
    torch.save({}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(tmp_path / "b.pt", "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, data if entry.filename.endswith("/data.pkl") else old.read(entry))
    return tmp_path / "b.pt"


def test_bombs(tmp_path):
    names = b"".join(b"csomelib\nName%d\n" % i for i in range(5000))
    assert "names of code" in refusal(archive(tmp_path, b"\x80\x02(" + names + b"t0}."))
    opcodes = archive(tmp_path, b"\x80\x02}X\x04\x00\x00\x00args(" + b"N" * 600_000 + b"ts.")
    assert "more opcodes than a checkpoint of its size" in refusal(opcodes)
    # Fewer opcodes, or a larger file of weights, are no bomb.
    few = archive(tmp_path, b"\x80\x02}X\x04\x00\x00\x00args(" + b"N" * 400_000 + b"ts.")
    assert len(read_checkpoint(few)["args"]) == 400_000
    large = {"state_dict": {"w": torch.ones(1 << 22)}, "more": [None] * 800_000}
    assert len(read_checkpoint(saved(tmp_path, large))["more"]) == 800_000
    # An entry of the memo with the largest number: a table of as many entries would take 64 GB.
    memo = archive(tmp_path, b"\x80\x02}X\x04\x00\x00\x00argscsomelib\nX\nr\xff\xff\xff\xffs.")
    assert read_checkpoint(memo)["args"].path == "somelib.X"
    zeros = b"\x80\x02csomelib\nX\nX\x00\x00\x00\x08" + bytes(2**27) + b"\x86."
    assert refusal(archive(tmp_path, zeros, zipfile.ZIP_DEFLATED))
    nested = [[]]
    for _ in range(60):
        nested = [nested, nested]  # 2^60 ways through it
    cyclic = []
    cyclic.append(cyclic)
    contents = {
        "state_dict": {"w": torch.ones(1)},
        "more": nested,
        "args": argparse.Namespace(x=Call(torch.save)),
    }
    assert read_checkpoint(saved(tmp_path, contents))["args"].x.path == "torch.serialization.save"
    assert "nested" in refusal(saved(tmp_path, contents | {"more": cyclic}))


def _frame(**changes):
    """The parts of a table as pandas 2 pickles them, some of them changed."""
    foreign = {}
    for path in (
        "pandas.core.frame.DataFrame",
        "pandas.core.internals.managers.BlockManager",
        "pandas._libs.internals._unpickle_block",
        "numpy.core.multiarray._reconstruct",
        "pandas.core.indexes.base._new_Index",
        "builtins.slice",
    ):
        foreign[path.rpartition(".")[2]] = type(path, (Foreign,), {"path": path})

    def array(shape, raw):
        made = foreign["_reconstruct"]()
        made.state = (1, shape, types.SimpleNamespace(code="i8", byteorder="<"), False, raw)
        return made

    values = changes.get("values", ((2, 2), bytes(32)))
    block = foreign["_unpickle_block"](array(*values), foreign["slice"](*changes.get("slice", (0, 2, 1))), 2)
    labels = changes.get("labels", ["verb", "noun"])
    columns = foreign["_new_Index"](None, {"data": array((len(labels),), labels)})
    rows = foreign["_new_Index"](None, {"start": 0, "step": 1, "stop": 2} | changes.get("rows", {}))
    frame = foreign["DataFrame"]()
    frame.state = changes.get("state", {"_mgr": foreign["BlockManager"]((block,), [columns, rows])})
    return frame


def test_a_table_whose_parts_are_of_another_form_is_not_believed():
    assert table_columns(_frame()) == {"verb": [0, 0], "noun": [0, 0]}
    for change in (
        {"values": ((2, 10**15), bytes(32))},
        {"values": ((2, -1), bytes(32))},
        {"values": ((10**9, 10**9), b"")},
        {"values": ((2, 2), "text")},
        {"values": (None, bytes(32))},
        {"slice": (0, 10**18, 1)} | {"values": ((3, 2), bytes(48))},
        {"slice": ("a", None, None)},
        {"slice": (0, 2, 0)},
        {"labels": ["verb", "verb"]},
        {"labels": ["verb", 3]},
        {"labels": "verb"},
        {"rows": {"stop": 10**18}},
        {"rows": {"stop": True}},
        {"rows": {"step": -1}},
        {"state": None},
        {"state": {"_mgr": 3}},
        {"state": []},
    ):
        assert table_columns(_frame(**change)) is None, change
    assert table_columns(None) is None and table_columns({"verb": [1]}) is None


@pytest.mark.parametrize("version", ["1.5", "1.5_legacy", "3_pyarrow"])
def test_changed_pickles_of_tables_raise_nothing_but_user_errors(tmp_path, rng, version):
    data = (FIXTURES / f"classifier_pandas{version}.pt").read_bytes()
    # The lines of names and the table: what the stand-ins are made from.
    start = data.index(b"mapping_act2v")
    end = data.index(b"allows_duplicate_labels")
    for _ in range(60):
        changed = bytearray(data)
        for at in rng.integers(start, end, rng.integers(1, 4)):
            changed[at] = rng.integers(0, 256)
        (tmp_path / "a.pt").write_bytes(changed)
        try:
            args = read_checkpoint(tmp_path / "a.pt").get("args")
        except UserError as error:
            assert "\n" not in str(error)
        else:
            table_columns(getattr(args, "actions", None))


def test_the_fixtures_hold_as_many_actions_as_their_heads():
    assert len(ACTIONS) == len(set(ACTIONS)) == 32
