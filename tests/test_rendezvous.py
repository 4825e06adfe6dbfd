"""How the nodes of a job meet: the address that node 0 publishes."""

import pytest

from launch.node.rendezvous import Meeting, RendezvousError, interface_address


def test_an_interface_is_known_by_its_name():
    assert interface_address("lo") == "127.0.0.1"


def test_an_interface_that_is_not_there_is_told_with_those_that_are():
    with pytest.raises(RendezvousError, match=r"has no address on ib7, only on .*lo \(127\.0\.0\.1\)"):
        interface_address("ib7")


def test_what_node_0_publishes_the_others_find(tmp_path):
    first, second = (Meeting(tmp_path, node, 2) for node in range(2))
    address, port = first.publish("10.0.0.1")
    assert second.find(timeout_s=1) == (address, port) == ("10.0.0.1", port)


def test_a_node_0_that_says_nothing_is_not_waited_for_for_ever(tmp_path):
    with pytest.raises(RendezvousError, match="node 0 did not say where to meet within 0 s"):
        Meeting(tmp_path, 1, 2).find(timeout_s=0)
