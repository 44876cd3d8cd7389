//! The wrapping keys that a mount works with, which may change while it is in use.

use crate::format::config::VolumeConfig;
use crate::fs::filesystem::Filesystem;
use crate::keys::{Recipient, volume};

impl Filesystem {
    /// The volume's wrapping keys with their providers.
    #[must_use]
    pub fn recipients(&self) -> Vec<Recipient> {
        self.volume.ring.recipients()
    }

    /// The volume's config as it was at the mount.
    #[must_use]
    pub fn config(&self) -> &VolumeConfig {
        &self.volume.config
    }

    /// Names the volume key; public.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 16] {
        self.volume.fingerprint
    }

    /// Takes these as the volume's wrapping keys from now on. Files that were given a header which is not on disk yet get
    /// another one when they are next written.
    pub fn change_keys(&self, config: &VolumeConfig, recipients: Vec<Recipient>) {
        self.rekeying.while_no_log_commits(|| self.volume.ring.change_keys(volume::allowed_keys(config), recipients));
        self.drop_unwritten_headers();
        self.rekeying.take_wrapping_key(config);
        tracing::info!("the volume's wrapping keys have changed");
    }

    /// Files that were given a header which is not on disk yet get another one.
    pub(in crate::fs) fn drop_unwritten_headers(&self) {
        for inode in self.inodes.all() {
            let mut slot = inode.slot();
            if slot.open.as_ref().is_some_and(|open| open.content.has_unwritten_header()) {
                slot.close();
            }
        }
    }
}
