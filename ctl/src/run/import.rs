//! `hearth image import`: a job with progress; Ctrl-C leaves it running and says how to look at it again.

use std::path::Path;

use hearth_protocol::ids::NameError;
use hearth_protocol::rpc::{Failure, FailureKind, NodeReply, NodeRequest};
use hearth_protocol::{ImageName, NodeId};

use super::{Context, job, plan};
use crate::Outcome;
use crate::cli::Change;
use crate::cluster::{Cluster, unexpected};
use crate::output;

/// The file and the image's name. A path cannot be a name and a name is no absolute path, so the two may also come the
/// other way round.
///
/// # Errors
/// Exit code 2.
pub fn what(file: &str, image: &str) -> Outcome<(String, ImageName)> {
    let (file, image) = if image.starts_with('/') && !file.starts_with('/') {
        (image, file)
    } else {
        (file, image)
    };
    let name = image
        .parse()
        .map_err(|e: NameError| Failure::new(FailureKind::Usage, e.to_string(), "hearth image import FILE IMAGE"))?;
    let path = if Path::new(file).is_absolute() {
        file.to_owned()
    } else {
        // A relative path means a file here; the node may be this machine.
        let here = std::fs::canonicalize(file).map_err(|e| {
            Failure::new(
                FailureKind::NotFound,
                format!("cannot find {file}: {e}"),
                "name a raw file that the node can read, with its absolute path on the node",
            )
        })?;
        here.to_string_lossy().into_owned()
    };
    Ok((path, name))
}

/// Starts the job and follows it.
///
/// # Errors
/// The job's failure; exit code 7 when it was left running.
pub async fn run(
    context: &Context,
    cluster: &Cluster,
    node: &NodeId,
    request: NodeRequest,
    detach: bool,
    change: Change,
) -> Outcome {
    if change.dry_run {
        plan::node(
            context,
            &format!("import a raw file into a new image on {node}"),
            node,
            &request,
        );
        return Ok(());
    }
    match cluster.node(node, &request).await? {
        NodeReply::Job(started) if detach => {
            output::note(&format!("it goes on: {}", job::resume(started.id, node)));
            context
                .out
                .one(&started, || format!("job {} on {node}: {}\n", started.id, started.what));
            Ok(())
        }
        NodeReply::Job(started) => job::follow(context, cluster, node, started).await,
        other => Err(unexpected(&format!("node {node}"), &other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_and_image_are_told_apart() {
        let check = |file, image| {
            let (path, name) = what(file, image).unwrap();
            assert_eq!((path.as_str(), name.as_str()), ("/srv/os.raw", "masters/os"));
        };
        check("/srv/os.raw", "masters/os");
        check("masters/os", "/srv/os.raw");
        assert_eq!(what("/srv/os.raw", "os").unwrap_err().kind, FailureKind::Usage);
        assert_eq!(
            what("no-such.raw", "masters/os").unwrap_err().kind,
            FailureKind::NotFound
        );
    }
}
