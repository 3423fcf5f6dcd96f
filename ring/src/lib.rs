//! KVM's dirty bitmap and dirty ring as dirty sources.
