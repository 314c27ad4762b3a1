//! Brings the log's epochs up to those of the store. They only stay behind where an operator accepted that the log lost
//! its end: an image was attached in what is gone.

use hearth_protocol::event::ImageAttached;
use hearth_protocol::rpc::{ExportKind, Failure};
use hearth_protocol::{Epoch, Event};

use super::node::SET_VERSION;
use super::requests::Requests;
use crate::store::ImageMeta;

impl Requests {
    /// Tells the attaches of an image that the log does not know, one by one, because an epoch is the last plus one;
    /// and for an image that is not served, that each ended.
    ///
    /// # Errors
    /// Those of publishing.
    pub(super) async fn tell_epochs(&self, meta: &ImageMeta) -> Result<u64, Failure> {
        let served = self.node.served.get(meta.id);
        let Some(lease) = meta.record.lease else {
            return Ok(0);
        };
        let mut told = 0;
        loop {
            let known = self.link.facts().validity().image(meta.id).map(|known| known.epoch);
            let Some(epoch) = known.filter(|known| *known < meta.record.epoch).map(Epoch::next) else {
                return Ok(told);
            };
            let attached = Event::ImageAttached(ImageAttached {
                image: meta.id,
                node: self.node.config.id.clone(),
                epoch,
                lease,
                set_version: SET_VERSION,
                device: served
                    .as_ref()
                    .is_some_and(|served| served.export == ExportKind::Device),
            });
            self.link.publish_image(meta.id, &attached).await?;
            if served.is_none() {
                let detached = Event::ImageDetached { image: meta.id, epoch };
                self.link.publish_image(meta.id, &detached).await?;
            }
            told += 1;
        }
    }
}
