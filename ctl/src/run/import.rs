//! Files of the node, as `hearth image import` and `hearth image export` are told of them.

use std::path::Path;

use hearth_protocol::ImageName;
use hearth_protocol::ids::NameError;
use hearth_protocol::rpc::{Failure, FailureKind};

use crate::Outcome;

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

/// The absolute path of a file that need not exist yet; a relative one starts here.
///
/// # Errors
/// Exit code 2 when it cannot be told where here is.
pub fn absolute(file: &str) -> Outcome<String> {
    let path = std::path::absolute(file).map_err(|e| {
        Failure::new(
            FailureKind::Usage,
            format!("cannot tell where {file:?} is: {e}"),
            "name the file with its absolute path on the node",
        )
    })?;
    Ok(path.to_string_lossy().into_owned())
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
