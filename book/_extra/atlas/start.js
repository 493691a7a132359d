"use strict";
scsaeAtlas.start();
