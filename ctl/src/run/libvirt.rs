//! `hearth libvirt-hook`: what libvirt's `qemu` hook is to do for a guest whose disks are Hearth's.
//!
//! libvirt calls the hook with the guest's name, an operation, its part and one more word, and writes the guest's XML to its
//! standard input. What it prints for `migrate` would replace that XML, and a failure of `prepare` or `migrate` keeps the
//! guest from starting: so nothing is ever printed to standard output, and every disk that is not where the guest is to start
//! is a failure.

use std::io::Read as _;

use hearth_protocol::rpc::{AttachHow, AttachInfo, ExportKind, Failure, FailureKind, NodeReply, NodeRequest};
use hearth_protocol::{ImageName, NodeId};

use super::Context;
use super::ask::Ask;
use crate::Outcome;
use crate::cli::LibvirtHook;
use crate::cluster::{Cluster, unexpected};

/// Bytes of a guest's XML that are read.
const XML_BYTES_MAX: u64 = 4 << 20;

/// What an operation of the hook means for a guest's disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// The guest is about to arrive here.
    Incoming,
    /// It is about to run here.
    Start,
    /// It does not run here any more.
    Release,
    Nothing,
}

fn step(operation: &str, part: &str) -> Step {
    match (operation, part) {
        ("migrate", "begin") => Step::Incoming,
        ("prepare", "begin") => Step::Start,
        ("release", "end") => Step::Release,
        _ => Step::Nothing,
    }
}

/// A guest's disk.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Disk {
    image: ImageName,
    export: ExportKind,
}

/// The disks that are images of the node with this NBD socket, or kernel devices under `devices`.
fn disks(xml: &str, socket: &str, devices: &str) -> Result<Vec<Disk>, String> {
    let document = roxmltree::Document::parse(xml).map_err(|error| format!("the guest's XML is not XML: {error}"))?;
    let sources = document
        .descendants()
        .filter(|node| node.has_tag_name("disk"))
        .filter_map(|disk| disk.children().find(|node| node.has_tag_name("source")));
    let mut disks = Vec::new();
    for source in sources {
        let on_socket = source.attribute("protocol") == Some("nbd")
            && source
                .children()
                .any(|host| host.has_tag_name("host") && host.attribute("socket") == Some(socket));
        let (name, export) = match (source.attribute("name"), source.attribute("dev")) {
            (Some(name), _) if on_socket => (name, ExportKind::Socket),
            (_, Some(device)) => match device.strip_prefix(devices).and_then(|rest| rest.strip_prefix('/')) {
                Some(name) => (name, ExportKind::Device),
                None => continue,
            },
            _ => continue,
        };
        let image = name.parse().map_err(|error| format!("the disk {name:?}: {error}"))?;
        disks.push(Disk { image, export });
    }
    Ok(disks)
}

/// Attached images of one node.
struct Here<'a> {
    cluster: &'a Cluster,
    node: NodeId,
    guest: &'a str,
}

pub async fn run(context: &Context, options: LibvirtHook) -> Outcome {
    let step = step(&options.operation, &options.part);
    if step == Step::Nothing {
        return Ok(());
    }
    let mut xml = String::new();
    std::io::stdin()
        .take(XML_BYTES_MAX)
        .read_to_string(&mut xml)
        .map_err(|error| wrong(format!("standard input: {error}")))?;
    let cluster = context.cluster().await?;
    let node = options.node;
    let NodeReply::Node(info) = cluster.node(&node, &NodeRequest::NodeShow).await? else {
        return Err(wrong(format!("node {node} does not say what its socket is")));
    };
    let devices = options.devices.to_string_lossy();
    let disks = disks(&xml, &info.socket, devices.trim_end_matches('/')).map_err(wrong)?;
    let here = Here {
        cluster: &cluster,
        node,
        guest: &options.guest,
    };
    for disk in disks {
        match step {
            Step::Incoming => here.incoming(&disk).await?,
            Step::Start => here.start(&disk).await?,
            Step::Release => here.release(&disk).await?,
            Step::Nothing => {}
        }
    }
    Ok(())
}

fn wrong(what: String) -> Failure {
    Failure::new(
        FailureKind::Usage,
        what,
        "libvirt writes the guest's XML to the hook's standard input; by hand: virsh dumpxml GUEST",
    )
}

impl Here<'_> {
    async fn attached(&self, image: &ImageName) -> Outcome<Option<AttachInfo>> {
        let images = self.cluster.images_of(&self.node).await?;
        let info = images.into_iter().find(|info| info.name == *image);
        Ok(info.and_then(|info| info.attached))
    }

    async fn change(&self, what: String, request: NodeRequest) -> Outcome {
        let ask = Ask {
            what,
            node: self.node.clone(),
            request,
        };
        let reason = format!("libvirt guest {}", self.guest);
        match self.cluster.change(&ask.node, &ask.asked(&reason)).await? {
            NodeReply::Image(_) | NodeReply::Done { .. } => Ok(()),
            other => Err(unexpected(&format!("node {}", self.node), &other)),
        }
    }

    async fn attach(&self, disk: &Disk, how: AttachHow) -> Outcome {
        let Disk { image, export } = disk.clone();
        let what = format!("attach {image}");
        self.change(what, NodeRequest::ImageAttach { image, export, how }).await
    }

    async fn incoming(&self, disk: &Disk) -> Outcome {
        match self.attached(&disk.image).await? {
            Some(attached) if attached.incoming => Ok(()),
            Some(_) => Err(Failure::new(
                FailureKind::Conflict,
                format!(
                    "{} is served on {} already, where its guest is to arrive",
                    disk.image, self.node
                ),
                format!("hearth image show {}", disk.image),
            )),
            None => self.attach(disk, AttachHow::Incoming).await,
        }
    }

    /// At a destination, the disk waits for its hand-over already.
    async fn start(&self, disk: &Disk) -> Outcome {
        match self.attached(&disk.image).await? {
            Some(_) => Ok(()),
            None => self.attach(disk, AttachHow::Plain).await,
        }
    }

    /// What was handed over is served here no more.
    async fn release(&self, disk: &Disk) -> Outcome {
        let Some(_) = self.attached(&disk.image).await? else {
            return Ok(());
        };
        let image = disk.image.clone();
        self.change(format!("detach {image}"), NodeRequest::ImageDetach { image })
            .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const XML: &str = r#"<domain type='kvm'><name>web</name><devices>
        <disk type='network' device='disk'><source protocol='nbd' name='appl/web'>
            <host transport='unix' socket='/run/hearth/nbd.sock'/><reconnect delay='60'/></source></disk>
        <disk type='network' device='disk'><source protocol='nbd' name='appl/other'>
            <host transport='unix' socket='/run/other.sock'/></source></disk>
        <disk type='network' device='disk'><source protocol='rbd' name='pool/disk'/></disk>
        <disk type='block' device='disk'><source dev='/dev/hearth/appl/data'/></disk>
        <disk type='block' device='disk'><source dev='/dev/hearthside/x/y'/></disk>
        <disk type='file' device='cdrom'/></devices></domain>"#;

    #[test]
    fn only_this_nodes_disks_are_its_business() {
        let found = disks(XML, "/run/hearth/nbd.sock", "/dev/hearth").unwrap();
        let disk = |image: &str, export| Disk {
            image: image.parse().unwrap(),
            export,
        };
        let expect = [
            disk("appl/web", ExportKind::Socket),
            disk("appl/data", ExportKind::Device),
        ];
        assert_eq!(found, expect);
        let bad = XML.replace("appl/web", "../web");
        assert!(
            disks(&bad, "/run/hearth/nbd.sock", "/dev/hearth")
                .unwrap_err()
                .contains("../web")
        );
        assert!(disks("<domain>", "", "/dev/hearth").is_err());
    }

    #[test]
    fn of_libvirts_operations_three_matter() {
        assert_eq!(step("migrate", "begin"), Step::Incoming);
        assert_eq!(step("prepare", "begin"), Step::Start);
        assert_eq!(step("release", "end"), Step::Release);
        for (operation, part) in [
            ("start", "begin"),
            ("started", "begin"),
            ("stopped", "end"),
            ("reconnect", "begin"),
        ] {
            assert_eq!(step(operation, part), Step::Nothing, "{operation}");
        }
    }
}
