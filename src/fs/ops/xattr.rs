//! Extended attributes: `user.*` encrypted under the volume's key, everything that the kernel or the backing filesystem gives
//! a meaning to passed through. `docs/FORMAT.md` section 7.6.

use std::io;
use std::sync::Arc;

use crate::crypto::NameKey;
use crate::format::xattr::{self, StoredName, StoredXattr};
use crate::fs::caller::Caller;
use crate::fs::error::Error;
use crate::fs::filesystem::Filesystem;
use crate::fs::kernel::InodeId;
use crate::fs::state::answer::Answer;
use crate::fs::state::inode::{DEFAULT_ACL, Inode, OpenFile};
use crate::storage::{Access, LABEL, NodeKind, XattrMode, host_may_label};

use super::backing_file::Found;
use super::setid::drop_after_acl;

const USER: &[u8] = b"user.";
const TRUSTED: &[u8] = b"trusted.";
const ACCESS_ACL: &[u8] = b"system.posix_acl_access";

/// Who gives an attribute its meaning.
enum Kind<'n> {
    /// A program: it is encrypted. The name without `user.`.
    Ours(&'n [u8]),
    /// The kernel or the backing filesystem.
    Backing,
}

fn kind_of(name: &[u8]) -> Result<Kind<'_>, Error> {
    if let Some(rest) = name.strip_prefix(USER) {
        return if rest.is_empty() { Err(Error::WrongKind) } else { Ok(Kind::Ours(rest)) };
    }
    match name {
        ACCESS_ACL | DEFAULT_ACL => Ok(Kind::Backing),
        _ if name.starts_with(TRUSTED) || name.starts_with(b"security.") => Ok(Kind::Backing),
        _ => Err(Error::Unsupported),
    }
}

impl Filesystem {
    /// The value of an attribute.
    ///
    /// # Errors
    /// [`Error::NoAttribute`] if it is not there.
    pub fn xattr(&self, id: InodeId, name: &[u8]) -> Result<Vec<u8>, Error> {
        let inode = self.inodes.get(id)?;
        let Kind::Ours(name) = kind_of(name)? else { return backing_xattr(&inode, name) };
        let Some(owner) = self.xattr_owner(&inode)? else { return Err(Error::NoAttribute) };
        let keys = &self.volume.xattrs;
        let sealed_name = keys.seal_name(&owner, name);
        let stored = StoredXattr::new(&sealed_name, NameKey::digest);
        let value = inode.node.xattr(stored.name.as_bytes())?;
        let value = stored.value(&value).and_then(|sealed| keys.open_value(&owner, &sealed_name, sealed).ok());
        value.ok_or(Error::Attribute).inspect_err(|error| self.report(&inode, error))
    }

    /// The names of all attributes that `caller` may know of, each ended by a NUL. Encrypted names that are not this file's are
    /// left out.
    ///
    /// # Errors
    /// [`Error`].
    pub fn xattr_names(&self, id: InodeId, caller: Caller) -> Result<Vec<u8>, Error> {
        let inode = self.inodes.get(id)?;
        let stored = match inode.node.xattr_names() {
            // A backing filesystem without attributes has none to show.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => return Ok(Vec::new()),
            names => names?,
        };
        let mut shown = Vec::new();
        let mut show = |prefix: &[u8], name: &[u8]| shown.extend([prefix, name, b"\0"].concat());
        let mut owner = None;
        for name in stored.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
            if let Some(ours) = xattr::classify(name) {
                if owner.is_none() {
                    owner = Some(self.xattr_owner(&inode)?);
                }
                if let Some(plain) = owner.flatten().and_then(|owner| self.plain_xattr_name(&inode, owner, name, ours))
                {
                    show(USER, &plain);
                }
            } else if matches!(kind_of(name), Ok(Kind::Backing)) && (caller.uid == 0 || !name.starts_with(TRUSTED)) {
                show(b"", name);
            }
        }
        Ok(shown)
    }

    fn plain_xattr_name(&self, inode: &Inode, owner: Owner, stored: &[u8], name: StoredName) -> Option<Vec<u8>> {
        let keys = &self.volume.xattrs;
        match name {
            StoredName::Sealed(sealed) => keys.open_name(&owner, &sealed).ok(),
            StoredName::InValue => {
                let value = inode.node.xattr(stored).ok()?;
                let sealed = xattr::sealed_name_in(&value)?;
                let own = StoredXattr::new(sealed, NameKey::digest).name.as_bytes() == stored;
                own.then(|| keys.open_name(&owner, sealed).ok()).flatten()
            }
        }
    }

    /// Sets an attribute; the answer may come from another thread, since a file without a header gets one.
    pub fn set_xattr(
        self: &Arc<Self>,
        id: InodeId,
        name: &[u8],
        value: &[u8],
        mode: XattrMode,
        caller: Caller,
        answer: Answer<()>,
    ) {
        let found = self.check_writable().and_then(|()| Ok((self.inodes.get(id)?, kind_of(name)?)));
        let (inode, name) = match found {
            Err(error) => return answer(Err(error)),
            Ok((inode, Kind::Backing)) => return answer(set_backing(&inode, name, value, mode, caller)),
            Ok((inode, Kind::Ours(name))) => (inode, name),
        };
        match self.xattr_owner(&inode) {
            Err(error) => answer(Err(error)),
            Ok(Some(owner)) => answer(self.put_xattr(&inode, owner, name, value, mode)),
            Ok(None) => {
                let (name, value) = (name.to_vec(), value.to_vec());
                self.with_content(inode, Access::ReadWrite, answer, move |fs, inode, open| {
                    fs.give_header(inode, open)?;
                    let owner = fs.xattr_owner(inode)?.ok_or(Error::NoHeader)?;
                    fs.put_xattr(inode, owner, &name, &value, mode)
                });
            }
        }
    }

    fn put_xattr(&self, inode: &Inode, owner: Owner, name: &[u8], value: &[u8], mode: XattrMode) -> Result<(), Error> {
        let keys = &self.volume.xattrs;
        let sealed_name = keys.seal_name(&owner, name);
        let stored = StoredXattr::new(&sealed_name, NameKey::digest);
        let sealed = [stored.lead, keys.seal_value(&owner, &sealed_name, value)].concat();
        Ok(inode.node.set_xattr(stored.name.as_bytes(), &sealed, mode)?)
    }

    /// Removes an attribute.
    ///
    /// # Errors
    /// [`Error::NoAttribute`] if it is not there.
    pub fn remove_xattr(&self, id: InodeId, name: &[u8]) -> Result<(), Error> {
        self.check_writable()?;
        let inode = self.inodes.get(id)?;
        let Kind::Ours(plain) = kind_of(name)? else {
            inode.change_privileges(|| inode.node.remove_xattr(name))?;
            inode.default_acl.forget();
            return Ok(());
        };
        let Some(owner) = self.xattr_owner(&inode)? else { return Err(Error::NoAttribute) };
        let stored = StoredXattr::new(&self.volume.xattrs.seal_name(&owner, plain), NameKey::digest);
        Ok(inode.node.remove_xattr(stored.name.as_bytes())?)
    }

    /// What the attributes of an inode are bound to; `None` for a file that has no header and so no attributes. Needs no
    /// provider.
    fn xattr_owner(&self, inode: &Inode) -> Result<Option<Owner>, Error> {
        self.volume.ring.check_unlocked()?;
        match inode.kind {
            NodeKind::Directory => Ok(Some(Owner::Directory(self.directory_id(inode)?))),
            NodeKind::File => {
                if let Some(id) = inode.file_id.get() {
                    return Ok(Some(Owner::File(*id)));
                }
                let file = self.open_backing(inode, Access::Read)?;
                let Found::Header(header) = self.find_header(inode, &file)? else { return Ok(None) };
                Ok(Some(Owner::File(*inode.file_id.get_or_init(|| header.header().file_id))))
            }
            // The kernel lets no other kind have attributes of programs.
            _ => Err(Error::Unsupported),
        }
    }

    /// A file without content gets its header now. Its modification time stays.
    fn give_header(&self, inode: &Arc<Inode>, open: &OpenFile) -> Result<(), Error> {
        self.ensure_keys(inode, open)?;
        let late = inode.late_mtime();
        let mtime = late.map_or_else(|| inode.node.stat().map(|stat| stat.mtime), Ok)?;
        open.content.ensure_header()?;
        inode.put_mtime(mtime)?;
        drop(late);
        self.work.unsettled.watch(&self.inodes, inode);
        Ok(())
    }
}

/// What a file's or a directory's attributes are bound to.
#[derive(Clone, Copy)]
enum Owner {
    File([u8; 32]),
    Directory([u8; 16]),
}

impl std::ops::Deref for Owner {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::File(id) => id,
            Self::Directory(id) => id,
        }
    }
}

/// That there is no label is no answer where labels mean nothing: a program that lists files would ask for that of each.
fn backing_xattr(inode: &Inode, name: &[u8]) -> Result<Vec<u8>, Error> {
    let value = inode.node.xattr(name).map_err(Error::from);
    let missing = |error: &Error| error.errno() == Error::NoAttribute.errno();
    if name == LABEL && value.as_ref().is_err_and(missing) && !host_may_label() {
        return Err(Error::Unsupported);
    }
    value
}

fn set_backing(inode: &Inode, name: &[u8], value: &[u8], mode: XattrMode, caller: Caller) -> Result<(), Error> {
    inode.change_privileges(|| inode.node.set_xattr(name, value, mode))?;
    inode.default_acl.forget();
    if name == ACCESS_ACL {
        drop_after_acl(inode, caller)?;
    }
    Ok(())
}
