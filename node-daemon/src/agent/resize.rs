//! Answers `hearth image resize`.

use hearth_protocol::rpc::{Answer, ExportKind, Failure, FailureKind, NodeReply};
use hearth_protocol::{ByteLen, Event, ImageName, LayerId};

use super::node::store_failure;
use super::requests::Requests;
use crate::store::ImageMeta;

/// The event that says how large an image is since its last growth, and the layer that was its top before.
pub(super) fn resized(meta: &ImageMeta) -> (Event, LayerId) {
    let sealed = meta.stack.get(1).copied().unwrap_or(meta.top());
    let event = Event::ImageResized {
        image: meta.id,
        size: ByteLen(meta.size),
        sealed,
        top: meta.top(),
    };
    (event, sealed)
}

impl Requests {
    pub(super) async fn resize(&self, image: ImageName, size: ByteLen) -> Answer<NodeReply> {
        let meta = self.find(&image)?;
        self.only_alone(&meta, "resized")?;
        let id = meta.id;
        self.link.ready()?;
        let meta = self
            .blocking(move |node| match node.served.get(id) {
                Some(served) if served.export == ExportKind::Device => Err(Failure::new(
                    FailureKind::Refused,
                    format!("image {image} is attached as a kernel device, which keeps its size under its guest"),
                    format!("stop the guest, then: hearth image detach {image}"),
                )),
                Some(served) => served.volume.grow(size.0).map_err(|e| store_failure(&e)),
                None => node.store.grow(id, size.0).map_err(|e| store_failure(&e)),
            })
            .await?;
        let (event, sealed) = resized(&meta);
        self.link.publish_image(id, &event).await?;
        self.sealed(sealed).await?;
        Ok(NodeReply::Image(self.info(&meta)))
    }
}
