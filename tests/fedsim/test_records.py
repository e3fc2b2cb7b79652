import copy
import gc
import pickle

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedsim.flower import compat, records
from fedsim.flower.records import LazyArray, LazyArrayRecord


@pytest.fixture
def stack():
    return {
        "weight": torch.arange(24, dtype=torch.float32).reshape(4, 3, 2),
        "steps": torch.arange(4),
    }


def test_a_row_reads_like_the_plain_array(stack):
    lazy = LazyArray(stack["weight"], 2)
    plain = Array(stack["weight"][2].numpy())
    assert (lazy.dtype, lazy.shape, lazy.stype) == (plain.dtype, plain.shape, plain.stype)
    assert np.array_equal(lazy.numpy(), plain.numpy())
    assert lazy.data == plain.data
    assert lazy == plain
    assert lazy.object_id == plain.object_id
    record = LazyArrayRecord({"weight": lazy})
    assert record.object_id == ArrayRecord({"weight": plain}).object_id
    assert lazy.stack is stack["weight"]
    assert lazy.row == 2
    assert "LazyArray(dtype=float32, shape=(3, 2))" in repr(lazy)


def test_numpy_gives_private_writable_copies(stack):
    lazy = LazyArray(stack["weight"], 0)
    lazy.numpy()[:] = 99
    assert stack["weight"].max() == 23
    assert lazy.numpy().max() == 5


def test_setting_the_bytes_makes_it_an_ordinary_value(stack):
    lazy = LazyArray(stack["weight"], 1)
    lazy.data = Array(np.full((3, 2), 7, np.float32)).data
    assert lazy.stack is None
    assert lazy.numpy().tolist() == [[7, 7]] * 3
    lazy.data = b""
    assert lazy.numpy().shape == (3, 2)


def test_pickling_and_deep_copies_carry_values_only(stack):
    record = records.stacked_record(stack, 3)
    plain = pickle.loads(pickle.dumps(record))
    assert type(plain) is ArrayRecord
    assert all(type(array) is Array for array in plain.values())
    assert all(np.array_equal(plain[k].numpy(), record[k].numpy()) for k in record)
    assert np.array_equal(copy.deepcopy(record["weight"]).numpy(), record["weight"].numpy())


def test_zero_dimensional_integers_pass_through(stack):
    record = records.stacked_record(stack, 3)
    assert record["steps"].shape == ()
    assert record.to_numpy_ndarrays()[1] == 3
    assert record.to_torch_state_dict()["steps"].dtype == torch.int64


def test_bfloat16_weighs_two_bytes_and_reads_as_float32():
    lazy = LazyArray(torch.ones(5, dtype=torch.bfloat16))
    assert records.array_bytes(lazy) == 10
    assert lazy.numpy().dtype == np.float32
    assert len(pickle.loads(pickle.dumps(LazyArrayRecord({"a": lazy})))) == 1


def test_taking_the_arrays_empties_the_record_without_collecting(stack, monkeypatch):
    monkeypatch.setattr(gc, "collect", lambda *_: pytest.fail("a full collection ran"))
    record = records.stacked_record(stack, 0)
    assert len(record.to_numpy_ndarrays(keep_input=False)) == 2
    assert len(record) == 0
    record = records.stacked_record(stack, 0)
    assert list(record.to_torch_state_dict(keep_input=False)) == ["weight", "steps"]
    assert len(record) == 0


@pytest.mark.parametrize("shape", [(), (1,), (17,), (3, 2), (1000, 1000, 3)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint8"])
def test_flower_counts_are_known_without_serialising(shape, dtype):
    if np.prod(shape) > 1e5:
        shape = (*shape[:1], 2)
    values = np.zeros(shape, dtype)
    plain = ArrayRecord({"layer.weight": Array(values)})
    lazy = LazyArrayRecord({"layer.weight": LazyArray(values)})
    assert lazy.count_bytes() == plain.count_bytes()
    assert lazy["layer.weight"].__dict__["_bytes"] is None


def test_payloads_are_elements_times_itemsize(stack):
    content = RecordDict(
        {
            "arrays": records.stacked_record(stack, 0),
            "config": ConfigRecord({"a": 1, "none": []}),
            "metrics": MetricRecord({"loss": 0.5}),
        }
    )
    assert records.payload_bytes(content) == 6 * 4 + 8
    arrays = ArrayRecord({k: Array(a.numpy()) for k, a in content["arrays"].items()})
    expected = arrays.count_bytes() + ConfigRecord({"a": 1}).count_bytes() + len("none")
    assert records.flower_bytes(content) == expected + content["metrics"].count_bytes()


def test_records_stack_from_common_rows_and_from_values(stack):
    rows = [records.stacked_record(stack, i) for i in (2, 0)]
    gathered = records.stack_records(rows)
    assert torch.equal(gathered["weight"], stack["weight"][[2, 0]])
    gathered["weight"].zero_()
    assert stack["weight"].max() == 23
    mixed = [rows[0], ArrayRecord({k: Array(a.numpy()) for k, a in rows[1].items()})]
    assert torch.equal(records.stack_records(mixed)["weight"], stack["weight"][[2, 0]])


def test_what_was_taken_does_not_see_later_changes(stack):
    content = RecordDict(
        {"arrays": records.stacked_record(stack, 0), "config": ConfigRecord({"server-round": 1})}
    )
    intake = records.Intake("dense", keep_dtypes=True)
    taken, size = intake(content)
    content["config"]["server-round"] = 2
    content["arrays"]["weight"] = LazyArray(torch.ones(2))
    changed, less = intake(content)
    content["arrays"].clear()
    assert taken["config"]["server-round"] == 1
    assert taken["arrays"]["weight"].shape == (3, 2)
    assert changed["arrays"]["weight"].shape == (2,)
    assert (size, less) == (3 * 2 * 4 + 8, 2 * 4 + 8)


def test_contents_with_the_very_same_arrays_share_one_copy(stack):
    model, other = records.stacked_record(stack, 0), records.stacked_record(stack, 1)
    intake = records.Intake("dense", keep_dtypes=True)
    contents = [
        RecordDict({"arrays": model, "control": other, "config": ConfigRecord({"server-round": i})})
        for i in range(2)
    ]
    (one, size), (two, size_again) = map(intake, contents)
    assert one is not two
    assert [taken["config"]["server-round"] for taken in (one, two)] == [0, 1]
    assert all(one[name] is two[name] for name in ("arrays", "control"))
    assert one["arrays"] is not model
    assert size == size_again == 2 * (3 * 2 * 4 + 8)
    flower = records.Intake("flower", keep_dtypes=True)
    assert [flower(content)[1] for content in contents] == [
        records.flower_bytes(content) for content in contents
    ]


def test_drifted_arrays_are_cast_as_they_are_taken():
    intake = records.Intake("dense", keep_dtypes=True)
    for dtype in (np.float32, np.float64, np.float64):
        content = RecordDict({"arrays": ArrayRecord({"w": Array(np.ones(3, dtype))})})
        taken, size = intake(content)
        assert (taken["arrays"]["w"].dtype, size) == ("float32", 12)
        assert content["arrays"]["w"].dtype == np.dtype(dtype).name


def test_what_is_known_of_a_stack_goes_with_it(stack):
    check = records.FiniteCheck()
    assert check(records.stacked_record({"w": stack["weight"]}, 0))
    bad = torch.tensor([[1.0], [torch.nan]])
    found = [check(records.stacked_record({"w": bad}, row)) for row in (0, 1, 0)]
    assert found == [True, False, True]
    assert len(check._bad) == 2
    del bad
    assert len(check._bad) == 1


def test_a_private_copy_may_be_changed_freely(stack):
    content = RecordDict(
        {
            "arrays": records.stacked_record(stack, 0),
            "config": ConfigRecord({"list": [1, 2]}),
        }
    )
    private = records.private_copy(content)
    private["config"]["list"].append(3)
    private["arrays"]["weight"].data = Array(np.zeros((3, 2), np.float32)).data
    private["arrays"].clear()
    assert content["config"]["list"] == [1, 2]
    assert content["arrays"]["weight"].numpy().max() == 5


def test_only_drifted_float_arrays_of_the_template_are_cast():
    first = ArrayRecord({"w": Array(np.ones(3, np.float32)), "n": Array(np.array(4))})
    template = records.template_of([first])
    drifted = {
        "w": Array(np.ones(3)),
        "n": Array(np.array(4.6)),
        "new": Array(np.ones(2)),
    }
    record = ArrayRecord(drifted)
    cast = records.cast_like(record, template)
    assert {key: (a.dtype, a.numpy().tolist()) for key, a in cast.items()} == {
        "w": ("float32", [1, 1, 1]),
        "n": ("int64", 5),
        "new": ("float64", [1, 1]),
    }
    assert record["w"].dtype == "float64"
    for kept in (ArrayRecord({"w": Array(np.ones(4))}), cast):
        assert records.cast_like(kept, template) is kept


def test_rows_are_copied_out_of_a_stack_that_is_hardly_used():
    stack = torch.arange(12.0).reshape(6, 2)
    held = [records.stacked_record({"w": stack}, row) for row in (0, 3, 5)]
    records.release_rows(held)
    assert all(record["w"].stack is stack for record in held)
    records.release_rows(held[1:])
    assert held[1]["w"].stack is held[2]["w"].stack
    assert held[1]["w"].stack.shape == (2, 2)
    assert [record["w"].numpy().tolist() for record in held] == [[0, 1], [6, 7], [10, 11]]


def test_replies_made_together_are_those_made_one_by_one():
    with compat.identity():
        asked = [
            Message(RecordDict(), node, "train.more", group_id=str(node), ttl=ttl)
            for node, ttl in ((1001, None), (1002, None), (1003, 5.0), (1004, 5.0))
        ]
        for message in asked:
            compat.set_message_id(message, f"m{message.metadata.dst_node_id}")
        contents = [RecordDict() for _ in asked]
        replies = compat.replies_to(asked, contents)
        for message, content, reply in zip(asked, contents, replies, strict=True):
            alone = Message(content, reply_to=message)
            assert reply.content is content
            assert not reply.has_error()
            assert vars(reply).keys() == vars(alone).keys()
            mine, other = (
                {k: v for k, v in vars(m.metadata).items() if k not in ("_created_at", "_ttl")}
                for m in (reply, alone)
            )
            assert mine == other
            assert reply.metadata.ttl == pytest.approx(alone.metadata.ttl, abs=1.0)
    assert len({id(reply.metadata) for reply in replies}) == len(replies)
