"""Create ten machines with the agent: python3 orchestrator.py BASE.qcow2 FOLDER [kvm|qemu].

BASE boots by its own boot loader, and is not changed. FOLDER gets an overlay for each machine;
libvirt's QEMU must be able to read both.
"""

import asyncio
import json
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path
from xml.sax.saxutils import quoteattr

import libvirt  # the distribution's python3-libvirt

import vmprovision

OVERLAY = vmprovision.ImageOptions(format="qcow2", allow_backing=True)  # we made it ourselves
DOMAIN = """<domain type='{type}'><name>{name}</name><vcpu>1</vcpu>
<memory unit='MiB'>256</memory><os><type machine='q35'>hvm</type></os>
<features><acpi/></features><cpu mode='maximum'/>
<devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/>
<source file={disk}/><target dev='vda' bus='virtio'/></disk>
<interface type='network'><source network='default'/><model type='virtio'/></interface>
<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng></devices></domain>"""


async def create(host, pool, base, folder, name, kind):
    disk = folder / f"{name}.qcow2"
    words = ("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, disk)
    made = await asyncio.create_subprocess_exec("qemu-img", *words)
    if await made.wait():
        raise SystemExit(f"{name}: no overlay")
    options = vmprovision.InjectOptions(vm_id=name)
    await asyncio.to_thread(vmprovision.inject, disk, options, source=OVERLAY, pool=pool)
    description = DOMAIN.format(type=kind, name=name, disk=quoteattr(str(disk)))
    domain = await asyncio.to_thread(host.createXML, description)
    while not (answer := await asyncio.to_thread(ask, domain)):
        await asyncio.sleep(1)
    print(name, *answer, flush=True)


def ask(domain):
    for card in domain.interfaceAddresses(0).values():  # by the leases of libvirt's DHCP server
        url = f"http://{card['addrs'][0]['addr']}:8080/health"
        with suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            return url, json.load(answer)["status"]
    return None


async def main(base, folder, kind="kvm"):
    host = libvirt.open()
    with vmprovision.Pool(size=2) as pool:
        names = [f"machine-{number}" for number in range(1, 11)]
        await asyncio.gather(*(create(host, pool, base, folder, name, kind) for name in names))


asyncio.run(main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), *sys.argv[3:]))
