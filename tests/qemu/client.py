"""What the official Python client does with a guest's QMP socket: argv is its path and where to migrate the guest."""

import asyncio
import sys

from qemu.qmp import ExecuteError, QMPClient


async def status(client, command, wanted):
    while True:
        found = await client.execute(command)
        if found["status"] == wanted:
            return found
        assert found["status"] not in ("failed", "cancelled"), found
        await asyncio.sleep(0.01)


async def main(path, address):
    client = QMPClient("test")
    await client.connect(path)
    names = {command["name"] for command in await client.execute("query-commands")}
    assert {"migrate", "calc-dirty-rate", "query-status"} <= names, names
    try:
        await client.execute("no-such-command")
    except ExecuteError as error:
        assert error.error_class == "CommandNotFound", error
    else:
        raise AssertionError("it is there")
    events = [{"capability": "events", "state": True}]
    await client.execute("migrate-set-capabilities", {"capabilities": events})
    await client.execute("calc-dirty-rate", {"calc-time": 1, "mode": "dirty-ring"})
    rate = await status(client, "query-dirty-rate", "measured")
    assert rate["dirty-rate"] > 0 and len(rate["vcpu-dirty-rate"]) == 2, rate
    await client.execute("migrate-set-parameters", {"downtime-limit": 10000})
    with client.listener() as listener:
        await client.execute("migrate", {"uri": address})
        told = []
        async for event in listener:
            data = event.get("data") or {}
            told.append((event["event"], data.get("status") or data.get("pass")))
            if told[-1] == ("MIGRATION", "completed"):
                break
    passes = [said for name, said in told if name == "MIGRATION_PASS"]
    assert passes == list(range(1, len(passes) + 1)), told
    others = [said for said in told if said[0] != "MIGRATION_PASS"]
    states = [("MIGRATION", state) for state in ("setup", "active", "completed")]
    assert others == states[:2] + [("STOP", None)] + states[2:], told
    sent = await client.execute("query-migrate")
    assert sent["status"] == "completed" and sent["ram"]["dirty-sync-count"] == len(passes), sent
    ended = await client.execute("query-status")
    assert ended["status"] == "postmigrate", ended
    await client.disconnect()


asyncio.run(main(*sys.argv[1:]))
