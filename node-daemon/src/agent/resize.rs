//! Answers `hearth image resize`.

use hearth_protocol::rpc::{Answer, ExportKind, Failure, FailureKind, NodeReply};
use hearth_protocol::{ByteLen, Event, ImageName};

use super::node::store_failure;
use super::requests::Requests;

impl Requests {
    pub(super) async fn resize(&self, image: ImageName, size: ByteLen) -> Answer<NodeReply> {
        let old = self.find(&image)?;
        self.link.ready()?;
        let (id, sealed) = (old.id, old.top());
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
        let event = Event::ImageResized {
            image: id,
            size: ByteLen(meta.size),
            sealed,
            top: meta.top(),
        };
        self.link.publish_image(id, &event).await?;
        self.sealed(sealed).await?;
        Ok(NodeReply::Image(self.info(&meta)))
    }
}
