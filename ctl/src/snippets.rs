//! How a guest gets an image: configuration for QEMU, libvirt and Proxmox VE.
//!
//! What every snippet has, and why: `reconnect-delay`, so that the guest stalls instead of failing while the node daemon
//! restarts; `werror=stop,rerror=stop`, so that it pauses instead of seeing an error after that; `cache=none`, because
//! the image's hot blocks are in RAM already and the guest's reads must be seen.

use hearth_protocol::ImageName;
use hearth_protocol::rpc::AttachInfo;

use crate::cli::Guest;

/// Seconds for which a guest waits for its daemon: longer than a restart with its recovery.
const RECONNECT_S: u64 = 60;

/// The snippet.
pub fn snippet(guest: Guest, image: &ImageName, info: &AttachInfo) -> String {
    let id = format!("{}-{}", image.project(), image.name()).replace(['.', '_'], "-");
    match guest {
        Guest::Qemu => qemu(&id, info),
        Guest::Libvirt => libvirt(info),
        Guest::Pve => pve(info),
    }
}

fn qemu(id: &str, info: &AttachInfo) -> String {
    let (socket, export) = (comma(&info.socket), comma(&info.export));
    let mut text = format!(
        "# NBD on the node's socket; survives restarts of the node daemon\n\
         -blockdev driver=nbd,node-name={id},server.type=unix,server.path={socket},export={export},\
         reconnect-delay={RECONNECT_S},cache.direct=on,cache.no-flush=off,discard=unmap,detect-zeroes=unmap \\\n\
         -device virtio-blk-pci,drive={id},werror=stop,rerror=stop\n"
    );
    if let Some(device) = &info.device {
        text += &format!(
            "\n# or the kernel block device, where the probes count every access{}\n\
             -blockdev driver=host_device,node-name={id}-dev,filename={},cache.direct=on,cache.no-flush=off,aio=io_uring,\
             discard=unmap \\\n\
             -device virtio-blk-pci,drive={id}-dev,werror=stop,rerror=stop\n",
            survives(info),
            comma(device)
        );
    }
    text
}

fn libvirt(info: &AttachInfo) -> String {
    let mut text = format!(
        "<!-- NBD on the node's socket; survives restarts of the node daemon -->\n\
         <disk type='network' device='disk'>\n  \
         <driver name='qemu' type='raw' cache='none' error_policy='stop' rerror_policy='stop' discard='unmap'/>\n  \
         <source protocol='nbd' name='{}'>\n    \
         <host transport='unix' socket='{}'/>\n    \
         <reconnect delay='{RECONNECT_S}'/>\n  \
         </source>\n  \
         <target dev='vda' bus='virtio'/>\n\
         </disk>\n",
        xml(&info.export),
        xml(&info.socket)
    );
    if let Some(device) = &info.device {
        text += &format!(
            "\n<!-- or the kernel block device, where the probes count every access{} -->\n\
             <disk type='block' device='disk'>\n  \
             <driver name='qemu' type='raw' cache='none' io='native' error_policy='stop' rerror_policy='stop' \
             discard='unmap'/>\n  \
             <source dev='{}'/>\n  \
             <target dev='vda' bus='virtio'/>\n\
             </disk>\n",
            survives(info),
            xml(device)
        );
    }
    text
}

fn pve(info: &AttachInfo) -> String {
    match &info.device {
        Some(device) => format!(
            "# qm set VMID with the kernel block device{}\n\
             qm set VMID --virtio0 {device},cache=none,werror=stop,rerror=stop,discard=on,backup=0,replicate=0\n",
            survives(info)
        ),
        None => {
            let args = qemu("hearth0", info)
                .lines()
                .filter(|l| !l.starts_with('#'))
                .map(|l| l.trim_end_matches(" \\"))
                .collect::<Vec<_>>()
                .join(" ");
            format!(
                "# Proxmox VE has no NBD disks of its own: the guest gets it as an argument. With a kernel block device\n\
                 # (hearth image attach --device) it is an ordinary disk instead.\n\
                 qm set VMID --args '{args}'\n"
            )
        }
    }
}

fn survives(info: &AttachInfo) -> &'static str {
    if info.device_survives_restart {
        "; survives restarts of the node daemon"
    } else {
        "; does NOT survive restarts of the node daemon on this kernel"
    }
}

/// A comma ends a value of QEMU's options unless it is doubled.
fn comma(text: &str) -> String {
    text.replace(',', ",,")
}

fn xml(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('\'', "&apos;")
}

#[cfg(test)]
mod tests {
    use hearth_protocol::Epoch;

    use super::*;

    fn info(device: Option<&str>) -> AttachInfo {
        AttachInfo {
            epoch: Epoch(3),
            socket: "/run/hearth/nbd.sock".into(),
            export: "appl/vm-1".into(),
            device: device.map(Into::into),
            incoming: false,
            device_survives_restart: false,
            read_latency: Default::default(),
        }
    }

    #[test]
    fn every_snippet_stops_instead_of_failing() {
        let image: ImageName = "appl/vm-1".parse().unwrap();
        for device in [None, Some("/dev/hearth/appl/vm-1")] {
            for guest in [Guest::Qemu, Guest::Libvirt, Guest::Pve] {
                let text = snippet(guest, &image, &info(device));
                assert!(text.contains("stop"), "{text}");
                assert!(text.contains("none") || text.contains("cache.direct=on"), "{text}");
                assert!(
                    (guest == Guest::Pve && device.is_some()) || text.contains("60"),
                    "no reconnect delay: {text}"
                );
                assert_eq!(text.contains("NOT survive"), device.is_some());
            }
        }
    }

    #[test]
    fn odd_paths_stay_one_value() {
        let mut odd = info(None);
        odd.socket = "/run/a,b<'&.sock".into();
        let image: ImageName = "a/b".parse().unwrap();
        assert!(snippet(Guest::Qemu, &image, &odd).contains("/run/a,,b<'&.sock,export"));
        assert!(snippet(Guest::Libvirt, &image, &odd).contains("/run/a,b&lt;&apos;&amp;.sock'"));
    }
}
